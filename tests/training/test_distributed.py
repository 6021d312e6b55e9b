"""Two CPU processes (gloo) do what one does."""
import importlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from forked import dies_in_the_second_step, late_look, no_batch_statistics, ranked

import util
from evaluation import result_files
from training import checkpoint, devices, distributed, epochs

ROOT = Path(__file__).resolve().parents[2]


def run(ranks, name, *argv, folder):
    """Runs a script as so many ranks, batch norm in evaluation mode."""
    ranked(ranks, name, *argv, prepare=no_batch_statistics, folder=folder)


def assert_close(ours, theirs, relative):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if value.is_floating_point():
            assert (value - theirs[name]).norm() <= relative * value.norm(), name


@pytest.mark.parametrize("loss", [
    "--softmax", pytest.param("--no-softmax", marks=pytest.mark.slow)])
def test_two_ranks_pretrain_to_the_weights_and_banks_of_one(drawn, tmp_path, loss):
    # one step of 13 clips, so uneven slices; three negatives of many, drawn for the global batch
    flags = ["pre-train_DVSCL", "--data_folder", drawn, "--cache", tmp_path / "cache", "--model",
             "resnet18v1", "--batch_size", 13, "--epochs", 1, "--nce_k", 3, loss]
    states = []
    for ranks in (1, 2):
        run(ranks, *flags, "--model_path", tmp_path / str(ranks), folder=tmp_path)
        (last,) = (tmp_path / str(ranks)).glob("*/last.pth")
        states.append(checkpoint.load(last))
    one, two = states
    assert_close(one["model"], two["model"], 1e-5)
    assert_close(one["contrast"], two["contrast"], 1e-5)
    # the momentum after one step is the gradient
    for ours, theirs in zip(one["optimizer"]["state"].values(),
                            two["optimizer"]["state"].values()):
        assert_close({"m": ours["momentum_buffer"]}, {"m": theirs["momentum_buffer"]}, 1e-5)


@pytest.mark.usefixtures("full_width")
def test_two_ranks_contrast_within_the_whole_batch(drawn, tmp_path):
    flags = ["pre-train_DVSCL", "--data_folder", drawn, "--cache", tmp_path / "cache", "--model",
             "resnet18v1", "--batch_size", 13, "--epochs", 1, "--contrast", "batch"]
    states = []
    for ranks in (1, 2):
        run(ranks, *flags, "--model_path", tmp_path / str(ranks), folder=tmp_path)
        (last,) = (tmp_path / str(ranks)).glob("batch_*/last.pth")
        states.append(checkpoint.load(last))
    assert_close(states[0]["model"], states[1]["model"], 1e-5)
    for ours, theirs in zip(*(state["optimizer"]["state"].values() for state in states)):
        assert_close({"m": ours["momentum_buffer"]}, {"m": theirs["momentum_buffer"]}, 1e-5)


@pytest.mark.parametrize("script, more", [
    ("LinearProbing_DVSCL_10fold", ["--protocol", "loso", "--batch_size", 8, "--epochs", 1]),
    ("LinearProbing_DVSCL_10fold", ["--protocol", "loso"]),
    pytest.param("fine-tune_DVSCL", ["--batch_size", 8, "--epochs", 1, "--subject", "s1", "s2",
                                     "s3"], marks=pytest.mark.slow),
    pytest.param("fine-tune_DVSCL", ["--batch_size", 8, "--epochs", 1, "--protocol", "10fold"],
                 marks=pytest.mark.slow)], ids=["sgd", "solved", "fine-tuned", "10fold"])
def test_folds_dealt_to_two_ranks_give_the_predictions_of_one(drawn, tmp_path, script, more):
    flags = [script, "--data_folder", drawn, "--cache", tmp_path / "cache", "--model",
             "resnet18v1", "--model_path", "random", *more]
    rows, mistakes = [], []
    for ranks in (1, 2):
        run(ranks, *flags, "--save_path", tmp_path / str(ranks), folder=tmp_path)
        (folder,) = (tmp_path / str(ranks)).glob("[pf]*_*")
        rows.append([row for path in sorted((folder / "subjects").glob("*.json"))
                     for row in result_files.read_subject(path)[1]])
        mistakes.append({row["key"]: maps for row, maps in result_files.read_mistakes(folder)[0]})
        assert (folder / "mistakes.png").exists() and (folder / "curves.png").exists()
    one, two = mistakes
    assert one.keys() == two.keys()
    for key, maps in one.items():
        assert all(abs(a.astype(int) - b).max() <= 1 for a, b in zip(maps, two[key]))
    one, two = rows
    assert [(r["key"], r["prediction"]) for r in one] == [(r["key"], r["prediction"]) for r in two]
    ours, theirs = (torch.tensor([r["probabilities"] for r in part]) for part in rows)
    assert torch.allclose(ours, theirs, atol=1e-4 if "--epochs" not in more else 1e-5)


def test_one_model_on_every_clip_is_trained_by_the_first_of_two_ranks(drawn, tmp_path):
    flags = ["fine-tune_DVSCL", "--data_folder", drawn, "--cache", tmp_path / "cache", "--model",
             "resnet18v1", "--model_path", "random", "--batch_size", 8, "--epochs", 1,
             "--subject", "all"]
    states = []
    for ranks in (1, 2):
        run(ranks, *flags, "--save_path", tmp_path / str(ranks), folder=tmp_path)
        (last,) = (tmp_path / str(ranks)).glob("finetune_*/last.pth")
        states.append(checkpoint.load(last))
    assert_close(states[0]["model"], states[1]["model"], 1e-6)
    assert_close(states[0]["classifier"], states[1]["classifier"], 1e-6)


def test_a_rank_that_looks_late_does_not_take_the_run_for_another(drawn, tmp_path):
    ranked(2, "fine-tune_DVSCL", "--data_folder", drawn, "--cache", "off", "--model",
           "resnet18v1", "--model_path", "random", "--batch_size", 8, "--epochs", 1, "--subject",
           "all", "--save_path", tmp_path / "runs", prepare=late_look, folder=tmp_path)
    assert list((tmp_path / "runs").glob("finetune_*/last.pth"))


def test_a_rank_that_dies_stops_the_others_with_an_error(drawn, tmp_path):
    with pytest.raises(AssertionError, match=r"RuntimeError: .* by peer"):  # rank 0's end
        ranked(2, "pre-train_DVSCL", "--data_folder", drawn, "--cache", tmp_path / "cache",
               "--model", "resnet18v1", "--batch_size", 4, "--epochs", 50, "--model_path",
               tmp_path / "runs", prepare=dies_in_the_second_step, folder=tmp_path)
    assert not list((tmp_path / "runs").glob("*/last.pth"))


def test_a_barrier_outlasts_the_time_limit_of_a_step_and_ranks_must_agree(tmp_path):
    # a rank whose last fold takes longer than the others' is no lost rank
    code = (f"import sys, time, datetime; sys.path.insert(0, {str(ROOT)!r})\n"
            "import torch\nfrom training import distributed\n"
            "distributed.TIMEOUT = datetime.timedelta(seconds=1)\n"
            "with distributed.group(torch.device('cpu')):\n"
            "    time.sleep(3 * distributed.rank()[0])\n"
            "    distributed.barrier()\n"
            "    distributed.agree('digest', 3)\n"
            "    try:\n"
            "        distributed.agree('digest', distributed.rank()[0])\n"
            "    except distributed.BadInput as error:\n"
            "        assert 'the ranks found different data' in str(error)\n"
            "    else:\n"
            "        raise SystemExit(1)\n"
            "    assert distributed.gather(torch.ones(2)).tolist() == [1] * 4\n")
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    ranks = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env={
        **os.environ, "RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
        "MASTER_PORT": port}) for r in range(2)]
    for rank in ranks:
        error = rank.communicate(timeout=120)[1]
        assert rank.returncode == 0, error


# ---------------------------------------------------------------- several GPUs, without one

CUDA = torch.device("cuda")


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 8])
def test_the_smallest_slice_is_that_of_the_cut(devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    for n in range(devices, 60):
        cut = torch.arange(n).chunk(devices)
        assert distributed.smallest_slice(n, CUDA) == min(map(len, cut))
        assert distributed.smallest_slice(n, torch.device("cpu")) == n
    monkeypatch.setattr(distributed, "active", lambda: True)
    monkeypatch.setattr(distributed, "size", lambda: devices)
    for n in range(60):
        assert distributed.smallest_slice(n, CUDA) == min(map(len, torch.arange(n)
                                                              .tensor_split(devices)))


@pytest.mark.parametrize("norm, n_data, fits", [
    (torch.nn.BatchNorm1d, 50, False), (torch.nn.BatchNorm1d, 49, True),
    (torch.nn.BatchNorm2d, 50, True), (torch.nn.SyncBatchNorm, 50, True)])
def test_a_batch_that_leaves_a_device_too_few_clips_is_refused_before_training(
        norm, n_data, fits, monkeypatch):
    # on eight devices 50 clips make seven slices of 7 and one of 1, and 49 seven of 7
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    if fits:
        epochs.check_slices(n_data, 64, norm(4), CUDA)
    else:
        with pytest.raises(util.BadInput, match="a batch of 50, and a device 1 of them"):
            epochs.check_slices(n_data, 64, norm(4), CUDA)


def test_replicas_in_threads_of_their_own_compute_in_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.nn, "DataParallel", lambda model: model)
    monkeypatch.setattr(devices, "_cpu_has_bfloat16", lambda: True)
    autocast, _ = devices.mixed_precision(True, torch.device("cpu"))
    model, actual = distributed.wrap(torch.nn.Linear(3, 2), CUDA, autocast), []
    replica = threading.Thread(target=lambda: actual.append(model(torch.ones(4, 3)).dtype))
    replica.start()
    replica.join()
    assert actual == [torch.bfloat16]


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_that_only_emulates_bfloat16_gets_float16(native, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: native or including_emulation)
    autocast, _ = devices.mixed_precision(True, CUDA)
    assert autocast().fast_dtype == dtype


def test_a_cpu_without_bfloat16_computes_in_float32_and_says_so_once(monkeypatch, capsys):
    devices._cpu_has_bfloat16.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    try:
        for _ in range(2):
            autocast, scaler = devices.mixed_precision(True, torch.device("cpu"))
            with autocast():
                assert torch.nn.Linear(3, 2)(torch.ones(4, 3)).dtype == torch.float32
        assert not scaler.is_enabled()
        assert capsys.readouterr().out.count("does not compute in bfloat16") == 1
    finally:
        devices._cpu_has_bfloat16.cache_clear()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for local in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert devices.local_device("cpu") == torch.device("cpu")
        if local < 2:
            assert devices.local_device("cuda") == torch.device("cuda", local)
        else:
            with pytest.raises(util.BadInput, match="more processes than the 2 GPUs"):
                devices.local_device("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(util.BadInput, match="--device cuda:1: every process would take this one"):
        devices.local_device("cuda:1")


def test_synchronised_batch_norm_takes_a_process_for_each_gpu(drawn, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    start = importlib.import_module("pre-train_DVSCL")
    opt = start.parse_option(["--data_folder", str(drawn), "--model_path", "m", "--model",
                              "resnet18v1", "--sync_bn"])
    with pytest.raises(util.BadInput, match="--sync_bn: takes a process for each GPU"):
        start.set_model(opt, [3, 3], 50, CUDA)
