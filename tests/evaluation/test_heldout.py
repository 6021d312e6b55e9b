"""Held-out runs of scripts that DVSCL has not: without a pre-trained source, without subjects."""
import json

import numpy as np
import pytest
import torch
from conftest import script

from evaluation import measures


def test_a_run_without_a_pre_trained_source_is_that_of_an_untrained_encoder(
        drawn, quick, tmp_path, small_crops, capsys):
    module = script("LinearProbing_DVSCL_10fold")
    results = {}
    for name in ("random", None):
        argv = [str(a) for a in ("--data_folder", drawn, *quick[:4], "--save_path",
                                 tmp_path / str(name), "--model_path", "random", "--l2", 0.01)]
        opt = module.parse_option(argv)
        if name is None:
            del opt.model_path
        folder, results[name] = module.evaluate(opt, argv, torch.device("cpu"),
                                                *module.set_loader(opt))
        results[name]["rows"] = (folder / "predictions.csv").read_text()
    assert results[None]["rows"] == results["random"]["rows"]
    assert results[None]["transductive"] is False and "model_path" not in results[None]["opt"]
    assert json.loads(json.dumps(results[None]["checkpoints"])) == {"None": None}
    capsys.readouterr()
    script("compare_results").main([folder / "results.json"])
    assert "probe, resnet18v1, 10fold" in capsys.readouterr().out


def rows(n=40, subject=""):
    rng = np.random.default_rng(2)
    return [{"database": "casme3", "subject": subject and f"{subject}{i % 5}", "key": f"k{i}",
             "label": int(rng.integers(3)), "prediction": int(rng.integers(3))} for i in range(n)]


def test_results_without_subjects_resample_images_and_say_so():
    images = measures.summarise(rows(), 3)
    assert images["resampled"] == "images" and images["n_subjects"] is None
    labels, said = ([row[name] for row in rows()] for name in ("label", "prediction"))
    by_hand = measures.intervals(labels, said, [f"k{i}" for i in range(40)], 3)
    for name in measures.MEASURES:
        assert images["ci95"][name] == pytest.approx(by_hand[name], abs=0.02)
    people = measures.summarise(rows(subject="s"), 3)
    assert people["resampled"] == "subjects" and people["n_subjects"] == 5


def test_everything_of_a_data_set_may_be_left_out_but_two_persons(drawn, tmp_path, capsys):
    module = script("LinearProbing_DVSCL_10fold")
    flags = ["--data_folder", str(drawn), "--save_path", str(tmp_path), "--model_path", "random",
             "--cache", "off"]
    opt = module.parse_option([*flags, "--without", "s1", "s2"])
    data, folds = module.set_loader(opt)
    assert [name for _, name in data.clips.people] == ["s3", "s4"] and len(folds.names) == 2
    with pytest.raises(SystemExit) as end:
        module.main([*flags, "--without", "nobody"])
    assert end.value.code == 2
    assert "--without nobody: no such subject" in capsys.readouterr().err
