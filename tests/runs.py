"""What a run left on the disk, read back and compared."""
import csv

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def only(folder, pattern="*/log.jsonl"):
    """The folder of the only run below `folder`."""
    (path,) = folder.glob(pattern)
    return path.parent


def refused(capsys, run, *argv):
    """The one error line of a call that must end with exit code 2."""
    with pytest.raises(SystemExit) as end:
        run(*argv)
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def load(path):
    return torch.load(path, weights_only=True)


def differing(a, b, at=""):
    """Where two nested states differ, bit for bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [at]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        return [d for k in a for d in differing(a[k], b[k], f"{at}/{k}")]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differing(x, y, f"{at}/{i}")]
    return [] if a == b else [at]


def states_differ(a, b):
    """Where the checkpoints of two pre-training runs differ, but for their options."""
    a, b = load(a), load(b)
    for state in (a, b):
        del state["opt"]
    return differing(a, b)


def rows(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def same_predictions(a, b):
    """Whether two runs predict the same, but for the last digits."""
    return [r["key"] for r in rows(a)] == [r["key"] for r in rows(b)] and np.allclose(
        *([[float(r["p_0"]), float(r["p_1"])] for r in rows(run)] for run in (a, b)), atol=1e-4)


def curves(folder):
    """{tag: {step: value}} of a TensorBoard folder, read by tensorboard itself."""
    reader = EventAccumulator(str(folder)).Reload()
    return {tag: {e.step: e.value for e in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]}
