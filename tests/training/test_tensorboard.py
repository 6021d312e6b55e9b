"""The curves as TensorBoard's own server gives them to the browser."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from conftest import pretrain, probe

from training import record

pytestmark = pytest.mark.usefixtures("small_crops")


def wait_for(function, *args, **kwargs):
    """The first true value of `function(*args, **kwargs)`; fails after a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        value = function(*args, **kwargs)
        if value:
            return value
        time.sleep(0.2)
    pytest.fail(f"no answer of {function.__name__} {args} {kwargs} within a minute")


@pytest.fixture
def server(tmp_path):
    """A function logdir → base URL of `python -m tensorboard.main` on the loopback address."""
    started = []

    def start(logdir):
        log = tmp_path / "server.log"
        with open(log, "w", encoding="utf-8") as file:
            # the environment of a shell: protobuf's implementation is not chosen for it
            shell = {k: v for k, v in os.environ.items()
                     if k != "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"}
            started.append(subprocess.Popen(
                [sys.executable, "-m", "tensorboard.main", "--logdir", logdir, "--host",
                 "127.0.0.1", "--port", "0", "--reload_interval", "1"],
                stdout=file, stderr=subprocess.STDOUT, env=shell, start_new_session=True))

        def address():
            assert started[-1].poll() is None, log.read_text()
            return re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        return wait_for(address).group()
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def get(base, path, **query):
    """The JSON of one address; None while the server does not have it yet."""
    try:
        with urlopen(f"{base}/data/{path}?{urlencode(query)}", timeout=20) as answer:
            return json.load(answer)
    except URLError:
        return None


def test_the_server_shows_the_scalars_of_two_runs(server, drawn, quick, tmp_path):
    flags = ["--data_folder", drawn, *quick, "--epochs", 2, "--tb_path", tmp_path / "tb"]
    pretrain(*flags, "--model_path", tmp_path / "runs")
    (first,) = tmp_path.glob("runs/memory_*")
    probe(*flags, "--model_path", first / "last.pth", "--save_path", tmp_path / "results")
    (second,) = tmp_path.glob("results/probe_*")
    base = server(tmp_path / "tb")
    names = {first.name, second.name}
    wait_for(lambda: set(get(base, "runs") or ()) >= names)
    for run in (first, second):
        lines = record.read_log(run)[1:]
        tags = lines[0].keys() - {"epoch"}
        assert get(base, "plugin/scalars/tags")[run.name].keys() == tags
        for tag in tags:
            points = wait_for(get, base, "plugin/scalars/scalars", run=run.name, tag=tag)
            assert [step for _, step, _ in points] == [1, 2]
            assert [value for *_, value in points] \
                == pytest.approx([line[tag] for line in lines], rel=1e-6)
    assert {"rgb_loss", "rgb_prob", "depth_loss", "depth_prob", "learning_rate"} \
        <= record.read_log(first)[1].keys()
