"""curve.png from metrics.jsonl, however little of it there is."""

import json

import numpy as np
import pytest

from toolkit.rundir.curve import _limits, _rows, _series, _smooth, draw

PNG = b"\x89PNG\r\n\x1a\n"


def _write(run_dir, rows, tail=""):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return run_dir


def _size(path):
    """Width and height from the header of the PNG."""
    data = path.read_bytes()
    assert data[:8] == PNG
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def _train(steps):
    return [{"step": s, "tokens": 512 * s, "train/loss_nats": 3 + 8 / s} for s in steps]


def _val(steps):
    return [{"step": s, "val/loss_nats": 3 + 8 / (s + 1), "val/bits_per_byte": 1.0} for s in steps]


@pytest.mark.parametrize(
    "rows, tail",
    [
        ([], ""),
        (_val([0]), ""),
        (_val([0, 10, 20]), ""),
        (_train([1]), ""),
        (_train(range(1, 1000)) + _val(range(0, 1000, 100)), ""),
        (_train(range(1, 20)), '{"step": 20, "train/lo'),
        (_train(range(1, 20)), '{"step": 20, "train/loss_nats": NaN}\n{"step": 21, "train/loss_nats": Infinity}\n'),
        ([{"step": 1, "train/loss_nats": float("nan")}], ""),
        ([{"step": 1, "train/loss_nats": None}, {"no": "step"}], '[1, 2]\n"text"\n\x00\n'),
        ([{"step": 5, "train/loss_nats": 2.0, "tokens": None}, {"step": 9, "val/loss_nats": 2.0}], ""),
    ],
    ids=["empty", "step 0", "validation", "one", "many", "cut", "not finite", "only nan", "odd", "flat"],
)
def test_draws_whatever_is_there(tmp_path, rows, tail):
    path = draw(_write(tmp_path / "run", rows, tail))
    assert path == tmp_path / "run" / "curve.png"
    assert _size(path) == (1000, 560)
    assert sorted(p.name for p in path.parent.iterdir()) == ["curve.png", "metrics.jsonl"]


def test_no_metrics_file_and_a_name_that_looks_like_mathematics(tmp_path):
    (tmp_path / "$a_{b$").mkdir()
    assert _size(draw(tmp_path / "$a_{b$")) == (1000, 560)


def test_the_picture_shows_the_values(tmp_path, monkeypatch):
    """What was drawn, asked of the figure itself."""
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    run = _write(tmp_path / "arm-1", _train(range(1, 400)) + _val([0, 200, 399]))
    draw(run)
    (axes,) = drawn[0].axes
    assert axes.get_title("left") == "arm-1"
    assert axes.get_title("right") == "204,288 tokens"
    assert axes.get_xlabel() == "step" and axes.get_ylabel() == "nats per token"
    raw, smooth, markers = axes.lines
    assert list(raw.get_xdata()) == list(range(1, 400)) and raw.get_alpha() < 1
    assert len(smooth.get_ydata()) == 399
    assert list(markers.get_xdata()) == [0, 200, 399] and markers.get_linestyle() == "None"
    assert [text.get_text() for text in axes.texts] == ["3.0200"]


def test_a_repeated_step_counts_once_and_order_does_not_matter(tmp_path):
    rows = [{"step": 2, "x": 5.0}, {"step": 1, "x": 7.0}, {"step": 2, "x": 6.0}, {"step": 3, "x": float("inf")}]
    steps, values = _series(_rows(_write(tmp_path, rows) / "metrics.jsonl"), "x")
    assert steps.tolist() == [1, 2] and values.tolist() == [7, 6]


def test_smoothing_keeps_a_straight_line_to_its_ends():
    line = np.linspace(5, 2, 50)
    assert np.allclose(_smooth(line, 7), line)
    assert np.ptp(_smooth(np.tile([0.0, 1.0], 50), 10)[15:-15]) < 0.1


def test_neither_the_start_nor_a_spike_sets_the_range():
    steps = np.arange(1.0, 1001)
    loss = 3 + 8 / steps
    loss[600] = 500
    low, high = _limits([(steps, loss), (np.array([0.0, 1000]), np.array([11.0, 3.1]))])
    assert 2.5 < low < 3.01 and 3.1 < high < 3.6
    low, high = _limits([(steps, loss), (np.array([1000.0]), np.array([9.0]))])
    assert high > 9
