"""Tiny models reach a stated quality, which falls where attention, the order of a second, the item table or the wall
between candidates and their actions is broken."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.pipelines.prepare.test_prepare import prepare
from tests.support.training import read_lines, train

USERS, SECOND = 1_500, 978_300_000


def chained_ratings(folder: Path) -> Path:
    """Ratings of which the last follows from the last but two, in the order of the file: each user's lie in one second.

    A user sees a, b, then the film that always follows a, then the one that follows b, and so on.
    """
    draw = np.random.default_rng(0)
    names = draw.permutation(200) + 1
    opened, following = names[:100], names[100:]
    folder.mkdir()
    lines = []
    for user in range(1, USERS + 1):
        for pair in draw.choice(100, (2, 2), replace=False):
            lines += [f"{user}::{film}::5::{SECOND + user}" for film in (*opened[pair], *following[pair])]
    (folder / "ratings.dat").write_text("\n".join(lines) + "\n")
    (folder / "users.dat").write_text("\n".join(f"{user}::F::25::1::1" for user in range(1, USERS + 1)) + "\n")
    return folder


def test_a_retriever_learns_what_follows_an_event_before_the_last(tmp_path: Path) -> None:
    data = tmp_path / "data"
    source = chained_ratings(tmp_path / "source")
    assert prepare("movielens", source, data, "--leave-last", "1", "--candidates", "1", "--min-history", "1") == 0
    train(
        tmp_path / "run",
        1,
        f"data.path={data}",
        "data.num_epochs=12",
        "data.global_batch_size=32",
        "data.eval_batch_size=512",
        "model.layer.relative_bias={}",
        "model.input.num_positions=1",
        "data.reader_threads=0",
        "model.retrieval.num_negatives=null",
        "model.input.dropout=0",
        "sparse_optimizer.learning_rate=0.05",
        "optimizer.learning_rate=5e-3",
        "log_every=100",
        "schedule.kind=cosine",
        "embedding_dim=16",
        recipe="movielens_retrieval",
    )

    assert read_lines(tmp_path / "run" / "eval.jsonl")[-1]["hr@10"] > 0.9


def moody_log(folder: Path) -> Path:
    """Events of users who like nine things in ten, or one in ten; a coin falls at each event."""
    draw = np.random.default_rng(1)
    user = np.repeat(np.arange(400), 24)
    moods = draw.choice([0.1, 0.9], 400)
    folder.mkdir()
    columns = {"user": user, "item": draw.integers(0, 80, len(user)), "at": SECOND + draw.integers(0, 10**7, len(user))}
    actions = {"like": draw.random(len(user)) < moods[user], "coin": draw.random(len(user)) < 0.5}
    pq.write_table(
        pa.table({**columns, **{name: x.astype(np.int8) for name, x in actions.items()}}), folder / "log.parquet"
    )
    return folder


def test_a_ranker_learns_moods_and_cannot_tell_a_coin(tmp_path: Path) -> None:
    data = tmp_path / "data"
    columns = ("--user-column", "user", "--item-column", "item", "--time-column", "at", "--action-columns", "like,coin")
    assert prepare("event_log", moody_log(tmp_path / "log"), data, *columns, "--candidates", "4") == 0
    train(
        tmp_path / "run",
        1,
        f"data.path={data}",
        "data.num_epochs=2",
        "data.global_batch_size=32",
        "data.reader_threads=0",
        "model.input.counts=[]",
        "embedding_dim=16",
        "sparse_optimizer.learning_rate=0.03",
        "optimizer.learning_rate=5e-3",
        "log_every=100",
        "schedule.kind=cosine",
        recipe="own_log",
    )
    (found,) = read_lines(tmp_path / "run" / "eval.jsonl")

    assert found["auc/like"] > 0.8
    assert 0.4 < found["auc/coin"] < 0.6
