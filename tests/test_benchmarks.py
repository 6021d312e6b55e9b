"""The tables of the learning benchmarks."""
from argparse import Namespace

import numpy as np
import pytest

from benchmarks.rows import Rows
from evaluation import measures
from util import BadInput


@pytest.mark.parametrize("own_people", [False, True])
def test_people_that_every_seed_tests_count_once(tmp_path, own_people):
    """Three seeds that say the same of the same people tell no more than one."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 240)
    said = np.where(rng.random(240) < .6, labels, rng.integers(0, 3, 240))
    part = labels, said, [f"s{i // 8}" for i in range(240)]
    rows = Rows(Namespace(work=tmp_path), 3)
    rows.own_people = own_people
    rows.add("one", [part])
    rows.add("three", [part] * 3)
    one, three = ([row["ci95"][1] - row["ci95"][0] for row in rows.rows])
    assert three / one == pytest.approx(3 ** -.5 if own_people else 1, rel=.1)
    assert rows.rows[1]["std"] == 0 and rows.rows[0]["uf1"] == rows.rows[1]["uf1"]


def test_what_looks_at_no_clip_has_an_interval_too(tmp_path):
    labels = np.repeat(range(4), [120, 60, 40, 20])
    people = [f"s{i % 24}" for i in range(240)]
    rows = Rows(Namespace(work=tmp_path), 4)
    rows.baselines([(labels, None, people), (labels[:200], None, people[:200])])
    majority, drawn = rows.rows
    assert majority["uf1"] == pytest.approx(2 * 240 / (240 + 440) / 4)  # of both seeds together
    # of each: 2 h / (h + n) / 4
    assert majority["std"] == pytest.approx(abs(1 / 6 - 240 / 320 / 4) / 2 ** .5)
    low, high = majority["ci95"]
    assert low < majority["uf1"] < high
    rng = np.random.default_rng(1)
    both, said = np.concatenate([labels, labels[:200]]), []
    for _ in range(2000):
        guess = np.concatenate([rng.choice(of, len(of)) for of in (labels, labels[:200])])
        said.append(measures.evaluate(both, guess, 4)["uf1"])
    assert drawn["uf1"] == pytest.approx(np.mean(said), abs=.002)
    assert drawn["ci95"] == pytest.approx(np.percentile(said, [2.5, 97.5]), abs=.006)


def test_what_other_options_made_is_not_taken_for_these(tmp_path):
    Rows(Namespace(work=tmp_path / "w", epochs=3, sizes=[1, 2], seeds=1), 3)
    Rows(Namespace(work=tmp_path / "w", epochs=3, sizes=[1, 2], seeds=5), 3)
    with pytest.raises(BadInput, match=r"options\.json: was run with --epochs 3, here 4"):
        Rows(Namespace(work=tmp_path / "w", epochs=4, sizes=[1, 2], seeds=1), 3)
