"""What a vLLM server does with the states that it captures; vLLM loads this file by itself.

vLLM's own example does the same on a GPU alone, and beside a copy that it does not wait for.
"""

import os
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    extract_from_kv_cache,
)
from vllm.utils.gpu_sync_debug import gpu_sync_allowed


class Copied:
    """An event that has come."""

    def query(self) -> bool:
        """Whether it has."""
        return True


class StatesToFiles(ExampleHiddenStatesConnector):
    """Writes the states of a request into a file that is locked until it is whole."""

    def _submit_async_write(self, pending: Any) -> None:
        if not self._is_tp_rank_zero:
            return
        tokens, cache = len(pending.token_ids), self._kv_cache
        blocks, within = torch.tensor(pending.block_ids), torch.arange(self._block_size)
        slots = (blocks[:, None] * self._block_size + within).flatten()[:tokens]
        with gpu_sync_allowed():
            states = extract_from_kv_cache(cache, slots.to(cache.device), tokens).cpu()
        kept = {"hidden_states": states.contiguous(), "token_ids": pending.token_ids.clone()}
        save_file(kept, pending.filename)
        os.close(self._lock_fds.pop(pending.req_id))
        self._req_copy_events[pending.req_id] = Copied()
