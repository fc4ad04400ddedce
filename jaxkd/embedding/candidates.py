"""Which candidates an anchor is compared with: said by a mask, by the ids of documents, or by a guide."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jaxkd.embedding.embedding_rows import as_embeddings, as_negatives, check_booleans
from jaxkd.loop.checks import check_is_array, check_scalar

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guide:
    """What another model makes of the same texts: what it finds nearer to an anchor than its positive is no negative.

    A candidate of anchor i is left out where its cosine, in the guide's embeddings, is above
    ``c_i - margin - relative_margin |c_i|``, with ``c_i`` that of the anchor and its own positive.

    Args:
      anchors, positives: (B, G) floating, of the guide's own width; no gradient reaches them.
      negatives: (B, G) or (B, K, G), where the loss has negatives; otherwise None.
      margin, relative_margin: numbers; with 0 what is exactly as near as the positive stays.

    Sources: Solatorio, "GISTEmbed" (arXiv 2402.16829); ``GISTEmbedLoss`` and ``CachedGISTEmbedLoss`` of
    sentence-transformers, whose margin strategies "absolute" and "relative" are the two margins.
    """

    anchors: ArrayLike
    positives: ArrayLike
    negatives: ArrayLike | None = None
    margin: ArrayLike = 0.0
    relative_margin: ArrayLike = 0.0


class Columns(NamedTuple):
    """The candidates of a row, of all rows alike.

    What is a row's own is its pair (always compared with it), itself or its own document (never), or a candidate like
    any other (its hard negatives).
    """

    owner: Int[Array, " M"]  # the row that it belongs to
    is_there: Bool[Array, " M"]
    is_pair: Bool[Array, " M"]
    is_itself: Bool[Array, " M"]
    ids: Int[Array, " M"] | None
    in_mask: Int[Array, " M"]  # its place among the documents: an anchor goes by its positive

    def kept(self, labels: Int[Array, " C"], of_rows: dict[str, Any], margins: Any) -> Bool[Array, "C M"]:
        """Which of them rows are compared with; ``labels`` are the rows' places among all rows, and their pair's."""
        is_own = self.owner == labels[:, None]
        kept = self.is_there & ~(is_own & self.is_itself)
        if self.ids is not None:
            kept &= self.ids != of_rows["ids"][:, None]
        if of_rows["mask"] is not None:
            kept &= of_rows["mask"][:, self.in_mask]
        if of_rows["guide"] is not None:
            cosines = of_rows["guide"]  # (C, M)
            of_pair = jnp.take_along_axis(cosines, labels[:, None], axis=1)
            margin, relative_margin = (jnp.asarray(x, cosines.dtype) for x in margins)
            kept &= cosines <= of_pair - margin - relative_margin * jnp.abs(of_pair)
        return kept | is_own & self.is_pair

    def other_pairs(self, labels: Int[Array, " C"]) -> Bool[Array, "C M"]:
        """A row's own pair a second time, from the positive's side."""
        columns = jnp.arange(self.owner.size, dtype=labels.dtype)
        return (self.owner == labels[:, None]) & self.is_pair & (columns != labels[:, None])


def columns_of(
    directions: Collection[str], counts: Bool[Array, " B"], negatives: Bool[Array, "B K"], ids: Any
) -> Columns:
    """Of the sides of `sides_of`, and in each the blocks of `blocks_of`.

    ``counts`` and ``negatives`` are those of all rows and their hard negatives that there are.
    """
    num_rows, num_negatives = negatives.shape
    rows, is_positive = jnp.arange(num_rows, dtype=jnp.int32), jnp.arange(num_rows * (1 + num_negatives)) < num_rows
    owner = jnp.concatenate([rows, jnp.repeat(rows, num_negatives)])
    is_there = jnp.concatenate([counts, (counts[:, None] & negatives).ravel()])
    if ids is not None:
        ids = jnp.concatenate([ids[:, 0], ids[:, 1:].ravel()])

    def block(side: str, name: str) -> Columns:
        part = slice(None) if name == "doc" else slice(num_rows)  # an anchor goes by its positive
        is_chosen = f"{side}_to_{name}" in directions
        is_pair = is_positive[part] & (side != name) & is_chosen
        is_itself = jnp.full_like(is_pair, side == name)
        places = jnp.arange(owner.size, dtype=jnp.int32)[part]
        own_ids = None if ids is None else ids[part]
        return Columns(owner[part], is_there[part] & is_chosen, is_pair, is_itself, own_ids, places)

    blocks = [block(side, name) for side in sides_of(directions) for name in blocks_of(directions)]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *blocks)


def sides_of(directions: Collection[str]) -> list[str]:
    """What is compared."""
    return [x for x in ("query", "doc") if any(d.startswith(x) for d in directions)]


def blocks_of(directions: Collection[str]) -> list[str]:
    """What it is compared with."""
    return [x for x in ("doc", "query") if any(d.endswith(x) for d in directions)]


def mask_of_documents(mask: Bool[Array, "N M"], num_rows: int, num_negatives: int) -> Bool[Array, "N W"]:
    """With columns for the rows that fill up the last device."""
    given = mask.shape[1] // (1 + num_negatives)
    if not 0 <= num_rows - given < num_rows // mask.shape[0]:
        raise ValueError(
            f"`candidate_mask` has {mask.shape[1]} columns; give one for each document of the batch, here "
            f"{num_rows * (1 + num_negatives)}"
        )
    filled = [(0, 0), (0, num_rows - given)], [(0, 0), (0, (num_rows - given) * num_negatives)]
    parts = mask[:, :given], mask[:, given:]
    return jnp.concatenate([jnp.pad(x, pad) for x, pad in zip(parts, filled, strict=True)], axis=1)


def masked_logsumexp(logits: Float[Array, "C M"], mask: Bool[Array, "C M"]) -> Float[Array, " C"]:
    """Over what is in the mask; -inf, and no gradient, where nothing is."""
    is_any = jnp.any(mask, axis=1)
    return jnp.where(is_any, jax.nn.logsumexp(jnp.where(mask | ~is_any[:, None], logits, -jnp.inf), axis=1), -jnp.inf)


def check_candidates(anchors: jax.Array, negatives: jax.Array | None, candidate_mask: Any, document_ids: Any) -> None:
    num_rows, num_documents = anchors.shape[0], 1 + (0 if negatives is None else negatives.shape[1])
    if candidate_mask is not None:  # inside of a shard_map it has more columns than there are rows here
        columns = jnp.shape(candidate_mask)[-1:]
        wanted = columns[0] if columns and columns[0] % num_documents == 0 else num_rows * num_documents
        check_booleans("candidate_mask", candidate_mask, (num_rows, wanted))
    if document_ids is not None:
        check_is_array("document_ids", document_ids)
        shapes = [(num_rows,)] if negatives is None else []
        shape, kind = jnp.shape(document_ids), jnp.result_type(document_ids)
        if not jnp.issubdtype(kind, jnp.integer) or shape not in [*shapes, (num_rows, num_documents)]:
            raise ValueError(
                f"`document_ids` is {kind.name} {shape}; give integers ({num_rows}, {num_documents}), of each row's "
                "positive and then of its negatives"
            )


def texts_of_guide(guide: Any, anchors: jax.Array, negatives: jax.Array | None) -> tuple[jax.Array, ...]:
    """Its anchors, positives and negatives, checked against the loss's own."""
    if not isinstance(guide, Guide):
        raise TypeError(f"`guide` is a {type(guide).__name__}; give a jaxkd.embedding.Guide")
    texts = as_embeddings(**{"guide.anchors": guide.anchors, "guide.positives": guide.positives})
    if texts[0].shape[0] != anchors.shape[0]:
        raise ValueError(f"`guide.anchors` has shape {texts[0].shape} but `anchors` has B={anchors.shape[0]}")
    if (guide.negatives is None) != (negatives is None):
        raise ValueError("`guide.negatives` and `negatives` belong together; give both or neither")
    if negatives is not None:
        texts.append(as_negatives("guide.negatives", guide.negatives, texts[0], "guide.anchors"))
        if texts[2].shape[1] != negatives.shape[1]:
            raise ValueError(f"`guide.negatives` has K={texts[2].shape[1]} but `negatives` K={negatives.shape[1]}")
    check_scalar("guide.margin", guide.margin)
    check_scalar("guide.relative_margin", guide.relative_margin)
    return tuple(jax.lax.stop_gradient(x) for x in texts)
