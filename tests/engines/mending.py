"""What vLLM 0.32 lacks or has wrong on a CPU: programs that say whether it is so, and its mend."""

NORM = """
import torch, vllm
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
current_platform.import_kernels()
torch.manual_seed(0)
key, weight = torch.randn(3, 7, 2, 32), torch.rand(3, 32) + 0.5
found = torch.empty_like(key)
ops.rms_norm(found, key, weight, 1e-6)
normed = key * torch.rsqrt(key.pow(2).mean(-1, keepdim=True) + 1e-6)
right = normed * weight[:, None, None]
print("differs" if (found - right).abs().max() > 1e-3 else "right")
"""
"""A norm of several layers' keys at once, each with its own weight: what vLLM's DFlash asks for."""
SPREAD = """
import torch, vllm
from vllm.platforms import current_platform
current_platform.import_kernels()
from vllm.utils import cpu_triton_utils
found = torch.full((3,), 7.0)
cpu_triton_utils._expand_kernel_impl(found, torch.tensor([0.5, 2.0]), torch.tensor([1, 3]), 0, 1)
print("right" if found.tolist() == [0.5, 2.0, 2.0] else "differs")
"""
"""Requests' temperatures, dealt to their drafted tokens: what sampling with any draft asks for."""
TRITON = """
from vllm.triton_utils import HAS_TRITON
print("right" if HAS_TRITON else "differs")
"""
"""Whether vLLM takes Triton, without which it has no DSpark."""
OVERLAY = """
import importlib.abc, importlib.util, os, sys

def custom_ops(module):
    whole = module.rms_norm

    def rms_norm(out, input, weight, epsilon):
        if weight is None or weight.dim() < 2:
            return whole(out, input, weight, epsilon)
        for layer in range(len(weight)):
            whole(out[layer], input[layer], weight[layer], epsilon)

    module.rms_norm = rms_norm

def cpu_triton_utils(module):
    def spread(output, input_val, cu_num_tokens, replace_from, replace_to, MAX_NUM_TOKENS=None):
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1)).long()
        values = input_val.masked_fill(input_val == replace_from, replace_to)
        output.copy_(values.repeat_interleave(counts))

    module._expand_kernel_impl = spread

def importing(module):
    module.HAS_TRITON |= os.environ.get("TRITON_INTERPRET") == "1"

MENDED = {
    "vllm._custom_ops": custom_ops, "vllm.utils.cpu_triton_utils": cpu_triton_utils,
    "vllm.triton_utils.importing": importing,
}

class Mended(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in MENDED:
            return None
        mend = MENDED.pop(name)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            mend(module)

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Mended())
"""
"""In every process of a server that finds it as sitecustomize: both of them, right. And Triton
counts as there where its interpreter runs it: vLLM takes on a CPU only one that is built for it."""
