"""The tables of the learning benchmarks."""
import numpy as np
import pytest

from benchmarks.rows import Rows


@pytest.mark.parametrize("own_people", [False, True])
def test_people_that_every_seed_tests_count_once(tmp_path, own_people):
    """Three seeds that say the same of the same people tell no more than one."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 240)
    said = np.where(rng.random(240) < .6, labels, rng.integers(0, 3, 240))
    part = labels, said, [f"s{i // 8}" for i in range(240)]
    rows = Rows(tmp_path, 3)
    rows.own_people = own_people
    rows.add("one", [part])
    rows.add("three", [part] * 3)
    one, three = ([row["ci95"][1] - row["ci95"][0] for row in rows.rows])
    assert three / one == pytest.approx(3 ** -.5 if own_people else 1, rel=.1)
    assert rows.rows[1]["std"] == 0 and rows.rows[0]["uf1"] == rows.rows[1]["uf1"]
