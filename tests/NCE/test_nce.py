"""Memory banks and losses: parity, the textbook way on random shapes, updates, negatives."""

import json
import math
import threading
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from NCE import NCEAverage as module
from NCE.BatchContrast import BatchContrast
from NCE.NCEAverage import NCEAverage
from NCE.NCECriterion import NCECriterion, NCESoftmaxLoss

PARITY = Path(__file__).resolve().parents[3] / "shared" / "parity" / "nce.json"
DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")])]
on_devices = pytest.mark.parametrize("device", DEVICES)
softmax_and_nce = pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "nce"])


@pytest.fixture(params=["dense", "chunked", "sample by sample"])
def path(request, monkeypatch):
    """Forces a way of computing the scores, whatever the sizes."""
    monkeypatch.setattr(module, "DENSE", 10 ** 9 if request.param == "dense" else 0)
    if request.param == "sample by sample":
        monkeypatch.setattr(module, "CHUNK", {"cpu": 1, "gpu": 1})
    return request.param


def loss_of(softmax, n):
    return NCESoftmaxLoss() if softmax else NCECriterion(n)


def unit(*shape, device="cpu"):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).float().to(device)


def textbook(banks, feats, index, idx, T, momentum, softmax, Z):
    """One step by gathering: losses, outputs, gradients, updated banks and Z, view by view."""
    views = {view: feat.detach().clone().requires_grad_() for view, feat in feats.items()}
    n, outs, Z = len(banks["rgb"]), {}, dict(Z)
    for view, other in (("rgb", "depth"), ("depth", "rgb")):
        rows = banks[other][idx]  # [B, W, d]
        out = torch.bmm(rows, views[view].unsqueeze(2)).squeeze(2) / T
        if not softmax:
            out = out.exp()
            Z[view] = Z[view] or out.mean().item() * n
            out = out / Z[view]
        outs[view] = out
    loss = sum(loss_of(softmax, n)(out) for out in outs.values())
    loss.backward()
    after = {}
    for view, feat in feats.items():
        after[view] = banks[view].clone()
        for row, i in zip(feat.detach(), index):
            moved = momentum * banks[view][i] + (1 - momentum) * row
            after[view][i] = moved / moved.norm()
    return outs, {view: feat.grad for view, feat in views.items()}, after, Z


def agree(got, want):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.skipif(not PARITY.exists(), reason="no parity fixtures beside the repository")
@on_devices
@softmax_and_nce
def test_bank_reproduces_public_implementation(softmax, device, path):
    fixture = json.loads(PARITY.read_text())["softmax" if softmax else "nce"]
    value = {key: torch.tensor(entry, device=device) for key, entry in fixture.items()}
    contrast = NCEAverage(fixture["d"], fixture["n"], fixture["K"], fixture["T"],
                          fixture["momentum"], softmax).to(device)
    contrast.memory_rgb.copy_(value["memory_rgb"])
    contrast.memory_depth.copy_(value["memory_depth"])
    feats = [value[key].clone().requires_grad_() for key in ("feat_rgb", "feat_depth")]
    outs = contrast(*feats, value["index"], value["idx"])
    losses = [loss_of(softmax, fixture["n"])(out) for out in outs]
    sum(losses).backward()
    got = {"out_rgb": outs[0], "out_depth": outs[1], "loss_rgb": losses[0],
           "loss_depth": losses[1], "grad_rgb": feats[0].grad, "grad_depth": feats[1].grad,
           "memory_rgb_after": contrast.memory_rgb, "memory_depth_after": contrast.memory_depth,
           "Z": torch.stack([contrast.Z_rgb, contrast.Z_depth])}
    for key, tensor in got.items():
        assert tensor.shape == value[key].shape, key
        error = (tensor - value[key]).abs().max() / value[key].abs().max()
        assert error <= 1e-4, (key, error)


# B, n, K, d, width of the idx given (None: the bank decides)
SHAPES = [(1, 7, 3, 5, 4), (6, 30, 9, 8, 10), (5, 300, 3, 16, 4), (4, 40, 9, 8, 600),
          (3, 900, 4, 4, 600), (3, 300, 4, 4, 257), (2, 2, 1, 4, None), (4, 4, 9, 8, None),
          (1, 6, 5, 3, None), (1, 1, 4, 3, None)]


@on_devices
@softmax_and_nce
@pytest.mark.parametrize("B, n, K, d, width", SHAPES)
def test_agrees_with_the_textbook_over_three_steps(B, n, K, d, width, softmax, device, path):
    torch.manual_seed(B + n)
    T, momentum = 0.3, 0.7
    contrast = NCEAverage(d, n, K, T, momentum, softmax).to(device)
    banks = {view: getattr(contrast, f"memory_{view}").clone() for view in ("rgb", "depth")}
    Z = {"rgb": None, "depth": None}
    for _ in range(3):
        feats = {view: unit(B, d, device=device).requires_grad_() for view in banks}
        index = torch.randperm(n)[:B].to(device)
        if width is None:
            others = [[j for j in range(n) if j != i] for i in index.tolist()]
            idx = torch.cat([index.view(B, 1).cpu(), torch.tensor(others).view(B, n - 1)], 1)
            idx = idx.long().to(device)
            outs = contrast(feats["rgb"], feats["depth"], index)
        else:
            idx = torch.randint(n, (B, width), device=device)  # the positive among them, too
            idx[:, 0] = index
            outs = contrast(feats["rgb"], feats["depth"], index, idx)
        sum(loss_of(softmax, n)(out) for out in outs).backward()
        want, grads, banks, Z = textbook(banks, feats, index, idx, T, momentum, softmax, Z)
        for out, view in zip(outs, ("rgb", "depth")):
            assert out.dtype == torch.float32
            agree(out[:, 0], want[view][:, 0])
            if width is None:  # all others once each, in any order
                agree(out.sort(dim=1)[0], want[view].sort(dim=1)[0])
            else:
                agree(out, want[view])
            if out.shape[1] > 1:  # without negatives softmax has no gradient but rounding
                agree(feats[view].grad, grads[view])
            agree(getattr(contrast, f"memory_{view}"), banks[view])
            if not softmax:
                assert getattr(contrast, f"Z_{view}").item() == pytest.approx(Z[view], rel=1e-5)


@on_devices
def test_gradients_see_the_banks_as_they_were_scored(device, path):
    """Two batches that share rows are scored, and the banks updated twice, before any backward."""
    torch.manual_seed(0)
    contrast = NCEAverage(8, 12, 5, use_softmax=True).to(device)
    outs, views, wanted = [], [], []
    for index in (torch.tensor([1, 2, 3]), torch.tensor([3, 2, 7])):
        index = index.to(device)
        feats = [unit(3, 8, device=device).requires_grad_() for _ in range(2)]
        idx = torch.cat([index.view(3, 1), torch.randint(12, (3, 5), device=device)], dim=1)
        weight = torch.randn(2, 3, 6, device=device)
        before = contrast.memory_depth.clone(), contrast.memory_rgb.clone()
        wanted += [(w.unsqueeze(2) * bank[idx]).sum(1) / 0.07 for w, bank in zip(weight, before)]
        outs += [(out * w).sum() for out, w in zip(contrast(*feats, index, idx), weight)]
        views += feats
    kept = contrast.memory_rgb.clone(), contrast.memory_depth.clone()
    for i in (2, 0, 3, 1):
        outs[i].backward()
        agree(views[i].grad, wanted[i])
    assert torch.equal(contrast.memory_rgb, kept[0])
    assert torch.equal(contrast.memory_depth, kept[1])


@on_devices
@softmax_and_nce
def test_one_step_moves_exactly_the_rows_of_the_batch(softmax, device):
    torch.manual_seed(0)
    contrast = NCEAverage(16, 50, 10, use_softmax=softmax).to(device)
    index = torch.tensor([4, 49, 0, 17], device=device)
    untouched = torch.ones(50, dtype=torch.bool)
    untouched[index.cpu()] = False
    for name in ("memory_rgb", "memory_depth"):
        assert torch.allclose(getattr(contrast, name).norm(dim=1).cpu(), torch.ones(50), atol=1e-6)
    before = {key: value.cpu().clone() for key, value in contrast.state_dict().items()}
    contrast(unit(4, 16, device=device), unit(4, 16, device=device), index)
    for name in ("memory_rgb", "memory_depth"):
        bank = getattr(contrast, name).cpu()
        changed = (bank - before[name]).abs().amax(dim=1)
        assert (changed[untouched] == 0).all()
        assert (changed[~untouched] > 0.01).all()
        assert torch.allclose(bank.norm(dim=1), torch.ones(50), atol=1e-6)
    assert not torch.equal(contrast.memory_rgb, contrast.memory_depth)


@softmax_and_nce
def test_evaluation_changes_nothing(softmax):
    contrast = NCEAverage(16, 50, 10, use_softmax=softmax).eval()
    before = {key: value.clone() for key, value in contrast.state_dict().items()}
    feats, index = (unit(4, 16), unit(4, 16)), torch.arange(4)
    outs = contrast(*feats, index)
    assert all(torch.isfinite(loss_of(softmax, 50)(out)) for out in outs)
    assert set(before) == {"memory_rgb", "memory_depth", "Z_rgb", "Z_depth"}
    for key, value in contrast.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert contrast.Z_rgb == -1


@softmax_and_nce
def test_state_is_all_there_is_to_save(softmax):
    first, second = (NCEAverage(8, 9, 20, use_softmax=softmax) for _ in range(2))
    feats, index = (unit(3, 8), unit(3, 8)), torch.arange(3)
    first(*feats, index)
    second.load_state_dict(first.state_dict())
    for a, b in zip(first(*feats, index), second(*feats, index)):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers()))


def test_negatives_are_uniform_over_the_others():
    n, K, B = 9, 7, 6000
    contrast = NCEAverage(4, n, K)
    for positive in (0, 4, 8):
        index = torch.full((B,), positive)
        idx = contrast.draw(index, torch.Generator().manual_seed(1))
        assert idx.shape == (B, K + 1)
        assert torch.equal(idx[:, 0], index)
        counts = torch.bincount(idx[:, 1:].flatten(), minlength=n).double()
        assert len(counts) == n and counts[positive] == 0
        mean = B * K / (n - 1)
        others = torch.arange(n) != positive
        assert (counts[others] - mean).abs().max() < 5 * math.sqrt(mean)
        repeats = (idx[:, 1:, None] == idx[:, None, 1:]).sum((1, 2)) > K
        assert repeats.any()  # with replacement
        # columns and rows are independent draws
        assert (idx[:, 1] == idx[:, 2]).double().mean().item() == pytest.approx(1 / 8, abs=0.03)
        assert (idx[1:, 1] == idx[:-1, 1]).double().mean().item() == pytest.approx(1 / 8, abs=0.03)


def test_draws_follow_the_seed_alone():
    contrast, index = NCEAverage(4, 30, 8, use_softmax=True).eval(), torch.arange(5)

    def drawn(seed):
        return contrast.draw(index, torch.Generator().manual_seed(seed))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    feats = unit(5, 4), unit(5, 4)
    torch.set_rng_state(state)
    given = contrast(*feats, index, drawn(1))
    assert torch.equal(state, torch.get_rng_state())  # nothing from the global generator so far
    for a, b in zip(contrast(*feats, index), contrast(*feats, index)):
        assert not torch.equal(a, b)
    torch.manual_seed(1)
    for a, b in zip(contrast(*feats, index), given):
        assert torch.equal(a, b)


def test_more_negatives_than_entries_means_all_others_once():
    contrast = NCEAverage(4, 6, 5, T=1.0, use_softmax=True).eval()
    contrast.memory_depth[:] = torch.arange(6.0).unsqueeze(1)
    index, feats = torch.tensor([0, 3, 5]), torch.full((3, 4), 0.25)
    state = torch.get_rng_state()
    assert contrast.draw(index) is None
    out, _ = contrast(feats, feats, index)
    assert torch.equal(state, torch.get_rng_state())
    assert out[:, 0].tolist() == [0, 3, 5]
    assert [sorted(row) for row in out.tolist()] == [[0, 1, 2, 3, 4, 5]] * 3
    assert contrast.K == NCEAverage(4, 6, 4096).K == 5
    assert NCEAverage(4, 7, 5).draw(index) is not None


@softmax_and_nce
def test_half_precision_features_are_scored_in_float32(softmax, path):
    torch.manual_seed(0)
    contrast = NCEAverage(32, 40, 12, use_softmax=softmax).eval()
    index, feats = torch.arange(6), [unit(6, 32).bfloat16() for _ in range(2)]
    idx = contrast.draw(index)
    want = contrast(*(feat.float() for feat in feats), index, idx)
    contrast.train()
    with torch.autocast("cpu", torch.bfloat16):
        views = [feat.clone().requires_grad_() for feat in feats]
        outs = contrast(*views, index, idx)
        losses = [loss_of(softmax, 40)(out) for out in outs]
    sum(losses).backward()
    for out, loss, reference, view in zip(outs, losses, want, views):
        assert out.dtype == loss.dtype == torch.float32
        agree(out, reference)
        assert view.grad.dtype == torch.bfloat16 and view.grad.abs().max() > 0
    assert contrast.memory_rgb.dtype == torch.float32
    assert torch.allclose(contrast.memory_rgb.norm(dim=1), torch.ones(40), atol=1e-6)


def test_autocast_around_backward_keeps_gradients_in_float32():
    contrast, index = NCEAverage(32, 40, 100, use_softmax=True).eval(), torch.arange(6)
    feats, grads = (unit(6, 32), unit(6, 32)), []
    for enabled in (False, True):
        view = feats[0].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            NCESoftmaxLoss()(contrast(view, feats[1], index)[0]).backward()
        grads.append(view.grad)
    agree(grads[1], grads[0])


@softmax_and_nce
def test_two_ranks_do_what_one_process_does(softmax):
    """Ranks are threads here that exchange tensors; shares of 4 and 2."""
    torch.manual_seed(0)
    whole = NCEAverage(8, 20, 5, use_softmax=softmax)
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    index = torch.tensor([7, 0, 3, 11, 19, 5])
    idx, feats = whole.draw(index), (unit(6, 8), unit(6, 8))
    want = whole(*feats, index, idx)
    barrier, slots, results = threading.Barrier(2, timeout=20), [None, None], [None, None]

    def rank(r, share):
        def gather(tensor):
            slots[r] = tensor
            barrier.wait()
            gathered = torch.cat(slots)
            barrier.wait()
            return gathered
        contrast = NCEAverage(8, 20, 5, use_softmax=softmax)
        contrast.load_state_dict(state)
        contrast.gather = gather
        outs = contrast(*(feat[share] for feat in feats), index[share], idx[share])
        results[r] = contrast, outs

    threads = [threading.Thread(target=rank, args=args)
               for args in enumerate((slice(0, 4), slice(4, 6)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        agree(torch.cat([outs[i] for _, outs in results]), want[i])
    for contrast, _ in results:
        for a, b in zip(contrast.buffers(), whole.buffers()):
            agree(a, b)
    # the same by hand: scores without an update, then one update with the gathered features
    contrast = NCEAverage(8, 20, 5, use_softmax=True).eval()
    contrast.load_state_dict(state)
    views = [feat[:4].clone().requires_grad_() for feat in feats]
    outs = contrast(*views, index[:4], idx[:4])
    contrast.update(*feats, index)
    agree(contrast.memory_rgb, whole.memory_rgb)
    sum(out.sum() for out in outs).backward()
    agree(views[0].grad, state["memory_depth"][idx[:4]].sum(1) / 0.07)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returns, the banks apart."""

    def __init__(self, contrast):
        super().__init__()
        self.numel = 0
        self.banks = [bank.data_ptr() for bank in contrast.buffers()]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.data_ptr() not in self.banks:
            self.numel = max(self.numel, result.numel())
        return result


@softmax_and_nce
@pytest.mark.parametrize("n", [100, 3000])
def test_no_step_gathers_the_rows_of_a_whole_batch(n, softmax, monkeypatch):
    B, K, d = 16, 99, 32
    monkeypatch.setattr(module, "CHUNK", {"cpu": 2 * (K + 1) * d * 4})
    contrast, index = NCEAverage(d, n, K, use_softmax=softmax), torch.arange(B)
    feats = [unit(B, d).requires_grad_() for _ in range(2)]
    idx = torch.randint(n, (B, K + 1))
    with Largest(contrast) as largest:
        sum(loss_of(softmax, n)(out) for out in contrast(*feats, index, idx)).backward()
    assert B * (K + 1) <= largest.numel <= 2 * (K + 1) * d  # an eighth of what gathering takes


def test_losses_by_hand():
    out = torch.tensor([[0.5, 0.1, 0.2], [0.3, 0.4, 0.6]], requires_grad=True)
    n, m, eps = 10, 2, 1e-7
    loss = 0
    for positive, *negatives in out.tolist():
        loss -= math.log(positive / (positive + m / n + eps))
        loss -= sum(math.log(m / n / (p + m / n + eps)) for p in negatives)
    criterion = NCECriterion(n)
    assert criterion(out).shape == ()
    assert criterion(out).item() == pytest.approx(loss / 2, rel=1e-6)
    probability = criterion.positive_probability(out)
    assert probability.shape == () and not probability.requires_grad
    assert probability.item() == pytest.approx((0.5 / 0.7 + 0.3 / 0.5) / 2, rel=1e-6)

    share = [math.exp(row[0]) / sum(map(math.exp, row)) for row in out.tolist()]
    criterion = NCESoftmaxLoss()
    assert criterion(out).shape == ()
    assert criterion(out).item() == pytest.approx(-sum(map(math.log, share)) / 2, rel=1e-6)
    probability = criterion.positive_probability(out)
    assert probability.shape == () and not probability.requires_grad
    assert probability.item() == pytest.approx(sum(share) / 2, rel=1e-6)


@pytest.mark.parametrize("sizes", [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_empty_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        NCEAverage(*sizes)


# ---------------------------------------------------------------- contrast within the batch

def test_the_batch_is_scored_as_a_loop_over_its_pairs():
    torch.manual_seed(0)
    rgb, depth = (unit(5, 8).requires_grad_() for _ in range(2))
    out_rgb, out_depth = BatchContrast(0.2)(rgb, depth, torch.arange(5))
    for i in range(5):
        others = [i] + [j for j in range(5) if j != i]
        assert out_rgb[i, 0].item() == pytest.approx((rgb[i] @ depth[i]).item() / 0.2, rel=1e-5)
        for actual, one, other in ((out_rgb, rgb, depth), (out_depth, depth, rgb)):
            assert sorted(actual[i].tolist()) == pytest.approx(
                sorted((one[i] @ other[j]).item() / 0.2 for j in others), rel=1e-5)
    loss = sum(map(NCESoftmaxLoss(), (out_rgb, out_depth)))
    scores = rgb @ depth.t() / 0.2
    same = F.cross_entropy(scores, torch.arange(5)) + F.cross_entropy(scores.t(), torch.arange(5))
    assert loss.item() == pytest.approx(same.item(), rel=1e-5)
    ours = torch.autograd.grad(loss, (rgb, depth))
    for a, b in zip(ours, torch.autograd.grad(same, (rgb, depth))):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_rank_scores_its_part_against_the_whole_batch():
    torch.manual_seed(0)
    rgb, depth = unit(5, 8), unit(5, 8)
    whole, part = BatchContrast(0.1), BatchContrast(0.1)
    mine = [rgb[3:], depth[3:]]
    part.gather = lambda features: rgb if features is mine[0] else depth
    for all_rows, rows in zip(whole(rgb, depth, torch.arange(5)),
                              part(*mine, torch.tensor([3, 4]))):
        assert torch.equal(all_rows[3:], rows)
