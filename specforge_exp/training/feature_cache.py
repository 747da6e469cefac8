"""The target's hidden states on disk, so that many epochs and runs pay for the target once.

`datasets/<data>--<model>.<draft>.features/` holds shards with `aux` [N, A] of every token and
`last` [M, H] of those that a loss can compare with, and index.json, which says where each
conversation lies. Training reads the rows it needs from the shards; nothing is scanned at the
start. Conversations without a supervised token are not in it, since nothing can be learnt from
them.

Shape suffixes: T packed tokens, A auxiliary states, H hidden.
"""

import logging
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from specforge_exp.artifacts import (
    Fingerprint,
    check,
    contents,
    disk_errors,
    read_object,
    read_record,
)
from specforge_exp.data.tokens import TokenSet
from specforge_exp.errors import InputError
from specforge_exp.lease import lease
from specforge_exp.records import digest_of, replacing, seal, write_json, write_record
from specforge_exp.training.batches import Batch, moved
from specforge_exp.training.features import Features, HiddenStates
from specforge_exp.training.ranks import Ranks

log = logging.getLogger(__name__)

SHARD_TOKENS = 65536
"""Tokens of one shard, about: 2 GB of an 8B target in bfloat16."""


Shard = list[tuple[int, int]]
"""Sign and number of its conversations: 1 for training, -1 for held-out ones."""


@dataclass(frozen=True)
class StoredStates:
    """Where one conversation's states lie in its shard."""

    file: str
    aux: int
    """First row in `aux`."""
    last: int
    """First row in `last`."""


def compared(turns_T: Tensor) -> Tensor:
    """Positions whose distribution a loss may ask for: a turn's tokens and the one after each."""
    inside_T = turns_T > 0
    return inside_T | torch.cat([inside_T.new_zeros(1), inside_T[:-1]])


def plan(splits: dict[int, TokenSet], shard_tokens: int) -> list[Shard]:
    """Shards of the supervised conversations, about shard_tokens each."""
    shards: list[Shard] = [[]]
    size = 0
    for sign, tokens in splits.items():
        for number, (_, turns) in enumerate(tokens):
            if not bool((turns > 0).any()):
                continue
            if size and size + len(turns) > shard_tokens:
                shards.append([])
                size = 0
            shards[-1].append((sign, number))
            size += len(turns)
    return [shard for shard in shards if shard]


def make_cache(
    folder: Path,
    target: HiddenStates,
    splits: dict[int, TokenSet],
    fingerprint: Fingerprint,
    ranks: Ranks,
    together: bool = False,
) -> None:
    """Write the shards that are missing, then the index.

    Args:
        folder: where to.
        target: gives the states.
        splits: training (1) and held-out (-1) conversations.
        fingerprint: what the states depend on.
        ranks: every process takes its part of the shards.
        together: the processes share the target: all run everything, the first one writes.

    Raises:
        InputError: the disk has no room, or the folder holds states of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first, made_of = ranks.rank == 0, folder / "made_of.json"
    with lease(folder, wait=True) if first else nullcontext():
        ranks.wait()
        there, changes = (folder / "index.json").exists(), []
        if there or made_of.exists():
            remedy = f"rm -r {folder} and run the same command"
            changes = fingerprint.changes(read_record(made_of, remedy))
        if changes:
            raise InputError(
                f"{folder} holds hidden states of something else: {'; '.join(changes)}. "
                f"Remove it (rm -r {folder}), set paths.datasets, or use target.cache=none"
            )
        if any(ranks.gather(there)):
            return
        shards = plan(splits, SHARD_TOKENS)
        sizes = [x.shape[-1] * x.element_size() for x in target([torch.zeros(1).long()])[0]]
        if first:
            announce(folder, splits, shards, sizes)
            write_record(made_of, vars(fingerprint))
        ranks.wait()
        mine = list(enumerate(shards))
        if not together:
            mine = mine[ranks.rank :: ranks.world]
        for index, shard in tqdm(mine, desc="cache", unit="shard", disable=None):
            path = folder / f"{index:05d}.safetensors"
            made = seal({**vars(fingerprint), "conversations": shard})
            missing = (first or not together) and not is_whole(path, made)
            if any(ranks.gather(missing)) if together else missing:
                states = shard_states(target, splits, shard)
                if first or not together:
                    write_shard(path, states, made)
        ranks.wait()
        if first:
            write_json(folder / "index.json", index_of(splits, shards))
            names = ["index.json", *(path.name for path in folder.glob("*.safetensors"))]
            write_record(made_of, {**vars(fingerprint), "files": contents(folder, names)})
            log.info("cache: complete: %s", folder)
        ranks.wait()


def announce(
    folder: Path,
    splits: dict[int, TokenSet],
    shards: list[Shard],
    sizes: list[int],
) -> None:
    """Say how large the cache will be, and refuse when the disk has less."""
    turns = [splits[sign][number][1] for shard in shards for sign, number in shard]
    tokens, heads = sum(map(len, turns)), sum(int(compared(t).sum()) for t in turns)
    bytes_needed = tokens * sizes[0] + heads * sizes[1]
    left_out = sum(map(len, splits.values())) - len(turns)
    log.info(
        "cache: %.2f GB for %d tokens of %d conversations (%d without supervision left out) in %s",
        bytes_needed / 1e9,
        tokens,
        len(turns),
        left_out,
        folder,
    )
    bytes_needed -= sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free = shutil.disk_usage(folder).free
    if bytes_needed > free:
        raise InputError(
            f"target.cache=disk needs {bytes_needed / 1e9:.2f} GB in {folder}, which has "
            f"{free / 1e9:.2f} GB free; make room, set paths.datasets or use target.cache=none"
        )


def shard_states(
    target: HiddenStates, splits: dict[int, TokenSet], shard: Shard
) -> dict[str, Tensor]:
    """Compute one shard."""
    aux, last = [], []
    texts, turns = zip(*(splits[sign][number] for sign, number in shard), strict=True)
    for (aux_TA, last_TH), turns_T in zip(target(list(texts)), turns, strict=True):
        aux.append(aux_TA.cpu())
        last.append(last_TH.cpu()[compared(turns_T)])
    return {"aux": torch.cat(aux), "last": torch.cat(last)}


def write_shard(path: Path, states: dict[str, Tensor], made_of: str) -> None:
    """Write one shard, whole or not at all, with a digest of its states and of `made_of`."""
    with disk_errors(path), replacing(path) as partial:
        save_file(states, partial, {"sha256": states_digest(states, made_of)})


def is_whole(path: Path, made_of: str) -> bool:
    """Whether a shard is there and is what was written, of the same conversations and options."""
    try:
        with safe_open(path, "pt") as shard:
            states = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
            digest = (shard.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return False
    return bool(digest == states_digest(states, made_of))


def states_digest(states: dict[str, Tensor], made_of: str) -> str:
    """Of the bytes: numpy has no bfloat16."""
    arrays = {
        name: tensor.contiguous().view(torch.uint8).numpy() for name, tensor in states.items()
    }
    return digest_of(arrays, made_of.encode())


def index_of(splits: dict[int, TokenSet], shards: list[Shard]) -> dict[str, Any]:
    """index.json: [file, first row of aux, first row of last] by conversation."""
    index: dict[str, Any] = {}
    for number_of_shard, shard in enumerate(shards):
        aux = last = 0
        for sign, number in shard:
            name = number if sign > 0 else -1 - number  # what a batch calls it
            index[str(name)] = [f"{number_of_shard:05d}.safetensors", aux, last]
            turns = splits[sign][number][1]
            aux, last = aux + len(turns), last + int(compared(turns).sum())
    return index


def from_disk(folder: Path, layers: int, hidden: int) -> Features:
    """Read a batch's states from the shards, one window ahead; positions that no loss asks for are
    0 in `last`.

    A conversation that is not in the cache has no supervised token: its states are zeros.

    Args:
        folder: what `make_cache` wrote.
        layers: how many feed the draft.
        hidden: the hidden size.
    """
    again = f"the same command, after rm {folder}/index.json and what is damaged"
    check(folder, again, "made_of.json")
    content = read_object(folder / "index.json", f"make it again with: {again}")
    try:
        index = {int(number): StoredStates(*place) for number, place in content.items()}
    except (TypeError, ValueError):
        index = {}
    if not index:
        raise InputError(f"{folder / 'index.json'} is no index; make it again with: {again}")
    opened: dict[str, Any] = {}

    def read(batch: Batch) -> tuple[Tensor, Tensor]:
        aux, last = [], []
        turns = batch.turns_T.split(batch.lengths)
        for number, length, turns_T in zip(batch.numbers, batch.lengths, turns, strict=True):
            compared_T = compared(turns_T)
            if number in index:
                aux_TA, last_MH = rows_of(
                    folder, opened, index[number], length, int(compared_T.sum())
                )
            else:
                aux_TA, last_MH = torch.zeros(length, layers * hidden), torch.zeros(0, hidden)
            full_TH = last_MH.new_zeros(length, hidden)
            full_TH[compared_T] = last_MH
            aux.append(aux_TA)
            last.append(full_TH)
        device = batch.ids_T.device
        return moved(torch.cat(aux), device), moved(torch.cat(last), device)

    return Features(lambda batches: lambda: [read(batch) for batch in batches], ahead=0)


def rows_of(
    folder: Path, opened: dict[str, Any], entry: StoredStates, tokens: int, compared_tokens: int
) -> tuple[Tensor, Tensor]:
    """One conversation's rows; InputError when the shard is missing or broken."""
    path = folder / entry.file
    try:
        if entry.file not in opened:
            opened[entry.file] = safe_open(path, "pt")
        shard = opened[entry.file]
        aux = shard.get_slice("aux")[entry.aux : entry.aux + tokens]
        last = shard.get_slice("last")[entry.last : entry.last + compared_tokens]
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); remove it and {folder / 'index.json'}, and run the "
            "same command: only what is missing is made again"
        ) from None
    return aux, last
