"""The whole job on a corpus of a few samples: every step by itself, and all that it leaves on the disk."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pear_data import open_store
from pear_data.config import ExportSettings, IngestSettings, ScoreSettings, WeightSettings
from pear_data.demo import asset
from pear_data.progress import Silent
from pear_data.runners.base import Scored
from pear_data.stages.export import export
from pear_data.stages.ingest import ingest
from pear_data.stages.mend import mend
from pear_data.stages.rescore import rescore
from pear_data.stages.score import score, score_policy
from pear_data.stages.sources import engine_source
from pear_data.stages.verify import verify
from pear_data.stages.weight import weight
from pear_data.store import writable_store

SAMPLES = 6
SHARD_TOKENS = 1000  # three samples
PROMPT = 300
STORE, OUT, CORPUS = "store", "out", "corpus.jsonl"


def rows(samples: int, prompt: int = PROMPT) -> list[str]:
    """JSON lines of token ids with the log-probs of two policies; the third cannot be read, one is a negative."""
    random = np.random.default_rng(0)
    lines = []
    for number in range(samples):
        length = prompt + 40 + number % 100
        mask = [position >= prompt for position in range(length)]
        behavior = -random.exponential(0.5, sum(mask))
        lines.append(
            json.dumps(
                {
                    "id": f"s{number}",
                    "source": "even" if number % 2 == 0 else "odd",
                    "label": -1 if number == 4 else 1,
                    "input_ids": random.integers(10, 60, length).tolist(),
                    "loss_mask": mask,
                    "initial": np.minimum(behavior + random.normal(0, 0.2, len(behavior)), 0).tolist(),
                    "behavior": behavior.tolist(),
                }
            )
        )
    return [*lines[:2], "{not JSON", *lines[2:]]


def corpus_settings(folder: Path) -> IngestSettings:
    return IngestSettings(
        corpus=[str(folder / CORPUS)],
        tokenizer=str(asset("initial")),
        id_field="id",
        source_field="source",
        label_field="label",
        shard_tokens=SHARD_TOKENS,
    )


def ingested(folder: Path) -> None:
    with writable_store(folder / STORE, create=True) as store:
        ingest(store, corpus_settings(folder), Silent())


def recorded(policy: str) -> Callable[[Path], None]:
    def scored(folder: Path) -> None:
        with writable_store(folder / STORE) as store:
            score_policy(store, ScoreSettings(policy=policy, from_field=policy), Silent())

    return scored


def modelled(folder: Path) -> None:
    """Scores with the bundled model, which stays loaded."""
    with writable_store(folder / STORE) as store:
        settings = ScoreSettings(policy="model", model=str(asset("initial")), engine="transformers")
        score(store, settings, engine_source(in_process(), None), Silent())


def weighted(folder: Path) -> None:
    with writable_store(folder / STORE) as store:
        weight(store, WeightSettings(), Silent())


def exported(folder: Path) -> None:
    settings = ExportSettings(out=str(folder / OUT), shard_tokens=SHARD_TOKENS, eval_fraction=0.3)
    export(open_store(folder / STORE), settings, Silent())


def mended(folder: Path) -> None:
    """The row that could not be read, written as it should be, makes one more shard of the corpus."""
    row = rows(SAMPLES + 1)[-1]
    line = {"input": CORPUS, "row": 3, "raw": row}
    (folder / "mended.jsonl").write_text(json.dumps(line) + "\n")
    with writable_store(folder / STORE) as store:
        mend(store, folder / "mended.jsonl", Silent())


def scored_with_failures(folder: Path) -> None:
    with writable_store(folder / STORE) as store:
        source = engine_source(InProcess(("s1", "s3", "s4")), None)
        score(store, ScoreSettings(policy="flaky", model="m"), source, Silent())


def retried(folder: Path) -> None:
    with writable_store(folder / STORE) as store:
        rescore(store, "scores/flaky", engine_source(InProcess(), None), Silent())


Step = Callable[[Path], None]
STEPS: dict[str, Step] = {
    "ingest": ingested,
    "score initial": recorded("initial"),
    "score behavior": recorded("behavior"),
    "weight": weighted,
    "export": exported,
    "score with a model": modelled,
    "score with failures": scored_with_failures,
    "quarantine retry": retried,
    "quarantine retry FILE": mended,
}


def whole_job(folder: Path) -> None:
    """Every step that needs no model, one after the other."""
    for name in WITHOUT_A_MODEL:
        STEPS[name](folder)


def write_corpus(folder: Path, samples: int, prompt: int = PROMPT) -> Path:
    """Make `folder` with nothing but a corpus in it."""
    folder.mkdir(parents=True)
    (folder / CORPUS).write_text("\n".join(rows(samples, prompt)) + "\n")
    return folder


WITHOUT_A_MODEL = ("ingest", "score initial", "score behavior", "weight", "export")


def make_states(folder: Path) -> dict[str, Path]:
    """Run the job once; what it is before each step, by the step, and at the end, by ""."""
    states = {}
    at = write_corpus(folder / "0", SAMPLES)
    for number, (name, step) in enumerate(STEPS.items(), 1):
        states[name] = at
        at = Path(shutil.copytree(at, folder / str(number)))
        step(at)
    states[""] = at
    return states


def whole_states(folder: Path) -> Path:
    """A job with every stage complete: before a mended row makes its corpus longer than its scores."""
    return make_states(folder)["quarantine retry FILE"]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a job but locks and logs."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if path.name != ".lock" and "logs" not in path.relative_to(folder).parts
    }


def assert_whole(folder: Path) -> None:
    """Every file that the manifest has is there, with its sha256; a tenth of the work of `assert_sound`."""
    if (folder / STORE / "manifest.json").exists():
        store = open_store(folder / STORE)
        assert not any(map(store.fault_of, store.manifest.files))


def assert_sound(folder: Path) -> None:
    """What the manifest says is there is there, whole; verify raises where it is not."""
    if (folder / STORE / "manifest.json").exists():
        verify(open_store(folder / STORE), Silent())


class InProcess:
    """The bundled model as a scorer in this process, so that it need not be started again after every fault."""

    def __init__(self, failures=()):
        self._engine, self._failures = _engine(), failures
        self.batch_tokens, self.max_length = self._engine.batch_tokens, self._engine.max_length
        self.identity = self._engine.identity

    def score(self, batch, on_tokens):
        failed = {row: "it died" for row, name in enumerate(batch.sample_ids) if name in self._failures}
        return Scored(self._engine.score(batch, on_tokens), failed)


@functools.cache
def _engine():
    from pear_data.engines.transformers_engine import TransformersEngine

    return TransformersEngine(str(asset("initial")))


in_process = functools.cache(InProcess)
