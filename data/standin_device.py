"""A stand-in for a GPU, for tests on a machine without one.

    import standin_device
    with standin_device.StandIn():
        model.to("standin")
        torch.ones(3, device="standin") + torch.ones(3)      # RuntimeError, as on a GPU

Its tensors hold CPU memory, say that they are on another device, and refuse to meet tensors of
the CPU. This finds a tensor that was left on the CPU. It says nothing about speed, kernels, low
precision or memory. Numbers are those of the CPU, random ones included.
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("standin")
# torch.tensor(..., device=) makes a CPU tensor first and moves it, which is then seen here.
torch._C._set_only_lift_cpu_tensors(True)


def no_low_precision():
    return [torch.bfloat16]


torch.standin.get_amp_supported_dtype = no_low_precision  # torch.autocast asks, even if disabled

DEVICE = torch.device("standin", 0)
MOVES = ("to", "_to_copy", "copy_")  # what may read one device and write the other


class OnDevice(torch.Tensor):
    """A tensor that says it is on the stand-in. `inside` is the CPU tensor that it holds."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inside):
        return torch.Tensor._make_wrapper_subclass(
            cls, inside.size(), strides=inside.stride(), dtype=inside.dtype, device=DEVICE,
            storage_offset=inside.storage_offset(),
        )

    def __init__(self, inside):
        self.inside = inside.detach()

    def tolist(self):
        return self.inside.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class StandIn(TorchDispatchMode):
    """Inside of this context device="standin" is known to functions that make tensors."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args, kwargs):
    """Run an operation of torch on the CPU tensors inside. Its result is on the stand-in if the
    operation was asked for that device, or if its arguments are there.
    """
    name = operation.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    # A GPU takes single numbers from the CPU.
    others = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() > 0]
    if ours and others and name not in MOVES:
        shapes = [tuple(tensor.shape) for tensor in others]
        raise RuntimeError(f"{name}: tensors on the stand-in and on the CPU, {shapes}")

    on_device = len(ours) > 0
    if name == "copy_":
        on_device = isinstance(args[0], OnDevice)
    for value in [*args, *kwargs.values()]:
        if isinstance(value, torch.device):
            on_device = value.type == "standin"
        elif name == "to" and value is not args[0] and isinstance(value, torch.Tensor):
            on_device = isinstance(value, OnDevice)
    with torch.no_grad():
        result = operation(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))

    def outside(value):
        if not isinstance(value, torch.Tensor):
            return value
        for tensor in tensors:
            if on_cpu(tensor) is value:
                if isinstance(tensor, OnDevice) == on_device:
                    return tensor  # an operation in place returns what it was given
                value = value.clone()  # two devices share no memory
        return OnDevice(value) if on_device else value

    return tree_map(outside, result)


def on_cpu(value):
    """What an operation gets in the place of one of its arguments."""
    if isinstance(value, OnDevice):
        return value.inside
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value
