"""Tensors whose elements are in other tensors."""

import torch


class Codes(torch.Tensor):
    """Codes and a scale that show as the numbers they stand for, as quantised weights do."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args, kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.view.default):
            return cls(args[0].codes, args[0].scale)
        given = [arg.codes * arg.scale if isinstance(arg, Codes) else arg for arg in args]
        return function(*given, **(kwargs or {}))


class FlatCodes(Codes):
    """The same, as torch's compiler takes them."""

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return FlatCodes(inner["codes"], inner["scale"])
