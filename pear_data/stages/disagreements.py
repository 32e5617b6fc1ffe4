"""Where two weightings disagree most, by name: samples and tokens that one favours and the other does not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from pear_data.stages.compared_samples import ComparedSamples, corpus_rows
from pear_data.stages.compared_tokens import Extreme, largest
from pear_data.store import Store
from pear_data.store.columns import flat_values
from pear_data.store.manifest import CORPUS

# Logarithms of float32 weights that differ by less do not differ.
_ROUNDING = 1e-5


class SampleDisagreement(BaseModel):
    """A sample that one weighting favours and another does not."""

    model_config = ConfigDict(extra="forbid")

    sample_id: str
    source: str
    first_weight_mean: float = Field(description="Mean weight of its scored tokens in the first weighting.")
    second_weight_mean: float = Field(description="The same in the second.")
    log_difference: float = Field(
        description="log(first_weight_mean) - log(second_weight_mean), less the pair's sample_log_difference."
    )


class TokenDisagreement(BaseModel):
    """A token that one weighting favours and another does not: the farthest of its sample."""

    model_config = ConfigDict(extra="forbid")

    sample_id: str
    source: str
    t: int = Field(description="Number among the sample's scored tokens, from 1.")
    token: str = Field(description="The text the token stands for.")
    first_weight: float
    second_weight: float
    log_difference: float = Field(
        description="log(first_weight) - log(second_weight), less the pair's token_log_difference."
    )


def sample_disagreements(
    store: Store,
    samples: ComparedSamples,
    pair: tuple[int, int],
    apart: npt.NDArray[np.float64],
    wanted: int,
) -> list[SampleDisagreement]:
    """The `wanted` samples with the largest |apart| [n], which is how far two weightings' logarithms lie apart, less
    their mean."""
    found = largest(np.abs(apart), wanted)
    found = found[np.argsort(-np.abs(apart[found]), kind="stable")]
    one, other = (samples.weight_means[index] for index in pair)
    return [
        SampleDisagreement(
            **_identity(store, samples, sample),
            first_weight_mean=float(one[sample]),
            second_weight_mean=float(other[sample]),
            log_difference=float(apart[sample]),
        )
        for sample in found.tolist()
        if abs(apart[sample]) > _ROUNDING
    ]


def token_disagreements(
    store: Store, samples: ComparedSamples, farthest: Sequence[Extreme], usual: float
) -> list[TokenDisagreement]:
    """The tokens found farthest apart; `usual` is how far two weightings' logarithms lie apart in the mean."""
    found = [extreme for extreme in farthest if abs(extreme.difference - usual) > _ROUNDING]
    return [
        TokenDisagreement(
            **_identity(store, samples, extreme.sample),
            t=extreme.t + 1,
            token=text,
            first_weight=extreme.first,
            second_weight=extreme.second,
            log_difference=extreme.difference - usual,
        )
        for extreme, text in zip(found, _texts(store, samples, found), strict=True)
    ]


def _identity(store: Store, samples: ComparedSamples, sample: int) -> dict[str, str]:
    shard, row = samples.place_of(sample)
    table = corpus_rows(store, samples.shards[shard], "sample_id", "source")
    found: dict[str, str] = table.slice(row, 1).to_pylist()[0]
    return found


def _texts(store: Store, samples: ComparedSamples, tokens: Sequence[Extreme]) -> list[str]:
    """The text of each token; its id where the store has no tokenizer."""
    ids = [_token_id(store, samples, token) for token in tokens]
    known = store.manifest.tokenizer
    if known is None:
        return [f"[{token_id}]" for token_id in ids]
    vocabulary = pq.read_table(store.file(known.vocabulary), columns=["token_id", "token"])
    chosen = vocabulary.filter(pc.is_in(vocabulary["token_id"], pa.array(ids, pa.int32())))
    text = dict(zip(*chosen.to_pydict().values(), strict=True))
    return [text.get(token_id, f"[{token_id}]") for token_id in ids]


def _token_id(store: Store, samples: ComparedSamples, token: Extreme) -> int:
    shard, row = samples.place_of(token.sample)
    for group in store.row_groups(samples.shards[shard].entries[CORPUS], ["input_ids", "loss_mask"]):
        if row < len(group):
            chosen = group.slice(row, 1)
            return int(flat_values(chosen["input_ids"])[flat_values(chosen["loss_mask"])][token.t])
        row -= len(group)
    raise AssertionError("the row is one of the shard's")
