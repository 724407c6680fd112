"""The out-of-core engine: what it tells of itself."""

import logging
from pathlib import Path

import pytest

from pipelines.prepare import engine


def test_a_long_query_tells_how_far_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(engine, "PROGRESS_SECONDS", 0.001)
    with engine.connect(tmp_path, 0.5, 1) as connection:
        sql = "SELECT sum(hash(i)) FROM range(100_000_000) AS numbers(i)"
        assert len(connection.execute(sql).fetchall()) == 1
    assert "% of this query done" in caplog.text
