"""Time and memory of one memory-bank step, against the textbook way.

    python benchmarks/bank_step.py

One step: scores of both views with the same idx, softmax loss, gradients of both features, update
of both banks. The comparison is own code in the textbook manner: gather the `[B, K+1, d]` rows of
each bank, one batched product. Every case runs in its own process. Memory is the peak of the
first step at full size above what the process held before it (banks, features, idx; libraries
warmed up by a step of toy size); milliseconds are the fastest of the steps after it, which other
programs disturb least. About one minute on two idle CPU cores, 3 GB of memory.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import memory
from NCE.NCEAverage import NCEAverage
from NCE.NCECriterion import NCECriterion, NCESoftmaxLoss


class TextbookBank(NCEAverage):
    """The same banks, scored by gathering every row that takes part."""

    def forward(self, feat_rgb, feat_depth, index, idx=None):
        out_rgb = self.gathered(feat_rgb, self.memory_depth, idx)
        out_depth = self.gathered(feat_depth, self.memory_rgb, idx)
        self.update(feat_rgb.detach(), feat_depth.detach(), index)
        return out_rgb, out_depth

    def gathered(self, feat, bank, idx):
        rows = bank.index_select(0, idx.view(-1)).view(*idx.shape, -1)  # [B, K+1, d]
        scores = torch.bmm(rows, feat.unsqueeze(2)).squeeze(2) / self.T  # [B, K+1]
        if self.use_softmax:
            return scores
        out = scores.exp()
        return out / (out.detach().mean() * self.n_data)


def parse_option(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[943, 50_000, 1_200_000],
                        help="bank sizes, entries")
    parser.add_argument("--batch_size", type=int, default=256, help="B, pairs")
    parser.add_argument("--nce_k", type=int, default=4096, help="K, negatives per positive")
    parser.add_argument("--feat_dim", type=int, default=128, help="d")
    parser.add_argument("--no-softmax", dest="softmax", action="store_false", default=True,
                        help="NCE instead of softmax scores and loss")
    parser.add_argument("--repeats", type=int, default=20, help="timed steps per case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(),
                        help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu or cuda")
    parser.add_argument("--case", choices=("textbook", "ours"), default=None,
                        help="run one case for the first of --n and print it as JSON")
    return parser.parse_args(argv)


def prepare(opt, case, n, batch_size, nce_k, device):
    """A function that makes one step and leaves nothing behind."""
    bank = {"ours": NCEAverage, "textbook": TextbookBank}[case]
    contrast = bank(opt.feat_dim, n, nce_k, use_softmax=opt.softmax).to(device)
    criterion = NCESoftmaxLoss() if opt.softmax else NCECriterion(n)
    feats = [F.normalize(torch.randn(batch_size, opt.feat_dim, device=device), dim=1)
             for _ in range(2)]
    index = torch.randperm(n)[:batch_size].to(device)
    idx = torch.randint(n, (batch_size, nce_k + 1)).to(device)
    idx[:, 0] = index

    def step():
        views = [nn.Parameter(feat) for feat in feats]
        sum(criterion(out) for out in contrast(*views, index, idx)).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return step


def run_case(opt):
    """{"ms": least time, "bytes": peak extra memory} of a step."""
    torch.manual_seed(0)
    torch.set_num_threads(opt.threads)
    device = torch.device(opt.device)
    # a toy case of each scoring path, for the libraries to load
    for n in (8, 4096):
        prepare(opt, opt.case, n, 2, 4, device)()
    step = prepare(opt, opt.case, opt.n[0], opt.batch_size, opt.nce_k, device)
    before, _ = memory(device, reset=True)
    step()
    _, peak = memory(device)
    times = []
    for _ in range(opt.repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"ms": 1e3 * min(times), "bytes": peak - before}


def run_apart(case, *argv, **flags):
    """`run_case` in a process of its own; flags: of this script, such as n=943."""
    more = [str(a) for name, value in flags.items() for a in (f"--{name}", value)]
    command = [sys.executable, __file__, *argv, *more, "--case", case]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main(argv=None):
    opt = parse_option(argv)
    if opt.case:
        print(json.dumps(run_case(opt)))
        return
    print(f"B {opt.batch_size}, K {opt.nce_k}, d {opt.feat_dim}, "
          f"{'softmax' if opt.softmax else 'NCE'}, {opt.device}, {opt.threads} CPU threads, "
          f"torch {torch.__version__}; comparison: own code in the textbook manner")
    print(f"{'n':>10} {'textbook ms':>12} {'ours ms':>9} {'faster':>8} "
          f"{'textbook MB':>12} {'ours MB':>9} {'smaller':>8}")
    for n in opt.n:
        usual, ours = (run_apart(case, *(argv or sys.argv[1:]), n=n)
                       for case in ("textbook", "ours"))
        print(f"{n:>10} {usual['ms']:>12.1f} {ours['ms']:>9.2f} {usual['ms'] / ours['ms']:>7.1f}x "
              f"{usual['bytes'] / 1e6:>12.1f} {ours['bytes'] / 1e6:>9.1f} "
              f"{usual['bytes'] / max(ours['bytes'], 1):>7.1f}x", flush=True)


if __name__ == "__main__":
    main()
