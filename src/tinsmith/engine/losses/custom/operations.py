"""The operations that a custom loss may use: every one of them is named here, with what it costs.

Left out on purpose: what draws random numbers, writes into its arguments, leaves torch, or makes a result
whose size depends on values without bound.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.engine.losses.custom import costs
from tinsmith.engine.losses.custom.costs import Refused, Rule

LONGEST_INTEGER = 64  # bits


@dataclass(frozen=True, slots=True)
class Operation:
    run: Callable[..., Any]
    cost: Rule


# torch.NAME, torch.nn.functional.NAME and x.NAME(), where there is such a one.

ELEMENTWISE = """
    abs absolute acos acosh add addcdiv addcmul arccos arccosh arcsin arcsinh arctan arctan2 arctanh
    asin asinh atan atan2 atanh binary_cross_entropy binary_cross_entropy_with_logits bitwise_and
    bitwise_not bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min clip copysign cos cosh
    cosine_similarity deg2rad digamma dist div divide elu eq erf erfc erfinv exp exp2 expm1 fix
    float_power floor floor_divide fmax fmin fmod frac gaussian_nll_loss ge gelu greater greater_equal
    gt hardshrink hardsigmoid hardswish hardtanh heaviside hinge_embedding_loss huber_loss hypot i0
    isclose isfinite isinf isnan isneginf isposinf kl_div l1_loss ldexp le leaky_relu lerp less
    less_equal lgamma log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logical_and logical_not
    logical_or logical_xor logit logsigmoid lt margin_ranking_loss masked_fill masked_scatter
    masked_select maximum minimum mish mse_loss mul multiply nan_to_num ne neg negative not_equal
    pairwise_distance poisson_nll_loss positive pow rad2deg reciprocal relu relu6 remainder round rsqrt
    rsub selu sgn sigmoid sign signbit silu sin sinc sinh smooth_l1_loss soft_margin_loss softplus
    softshrink softsign special_entr special_erf special_erfc special_exp2 special_expit special_expm1
    special_gammaln special_log1p special_log_ndtr special_logit special_ndtr special_round special_sinc
    special_xlog1py special_xlogy sqrt square sub subtract take_along_dim tan tanh tanhshrink
    true_divide trunc xlogy
""".split()

NO_MORE = """
    all amax amin aminmax any argmax argmin argsort atleast_1d atleast_2d cat concat concatenate
    count_nonzero cummax cummin cumprod cumsum dot flip fliplr flipud gather hstack index_add index_copy
    index_fill kthvalue log_softmax logcumsumexp logsumexp max mean median min mode msort nanmean
    nanmedian nansum normalize prod roll scatter scatter_add softmax softmin sort special_log_softmax
    special_logsumexp special_softmax stack std std_mean sum take topk trace tril triu unique unsqueeze
    var var_mean vdot vstack
""".split()

VIEWS = """
    diagonal flatten moveaxis movedim narrow permute ravel reshape select squeeze swapaxes swapdims t
    transpose unflatten
""".split()

METHODS = {
    **dict.fromkeys(
        ("bfloat16 bool clone contiguous double float half int long to type_as new_tensor").split(),
        costs.no_more,
    ),
    **dict.fromkeys(
        "detach dim element_size expand_as is_floating_point nelement reshape_as size view view_as".split(),
        costs.free,
    ),
}

BY_SHAPE = """
    block_diag broadcast_tensors broadcast_to chunk diag diag_embed diagflat ger index_select kron
    meshgrid nanquantile outer pad quantile repeat split split_with_sizes tile unbind unfold
""".split()

PRODUCTS = "addmm addmv addr bmm cdist corrcoef cov inner linalg_matmul linear matmul mm mv".split()
FROM_SIZES = "arange eye full linspace ones scalar_tensor tril_indices triu_indices zeros".split()
LIKE = "full_like ones_like zeros_like".split()
NEW = "new_full new_ones new_zeros".split()

MATH = """
    acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh degrees erf erfc exp exp2 expm1
    fabs floor fmod gamma hypot isclose isfinite isinf isnan ldexp lgamma log log10 log1p log2 pow
    radians remainder sin sinh sqrt tan tanh trunc
""".split()

OPERATORS = """
    abs add and_ eq floordiv ge gt invert le lt mod mul ne neg or_ pos pow sub truediv xor
""".split()


def _number(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """An operator on tensors and numbers alone: on texts and lists some would build huge ones."""

    def operate(*args: Any) -> Any:
        for arg in args:
            if not isinstance(arg, Tensor | int | float):
                raise Refused(f"it takes tensors and numbers, no {type(arg).__name__}")
        if name == "pow" and all(isinstance(arg, int) for arg in args):
            base, exponent = args
            if base.bit_length() * abs(exponent) > LONGEST_INTEGER:
                raise Refused("the result would be a huge integer")
        return run(*args)

    return operate


def _get_attribute(value: Any, name: Any, *rest: Any) -> Any:
    if isinstance(value, Tensor) and name in ("shape", "dtype", "device", "ndim", "T", "mT", "H", "mH"):
        return getattr(value, name)
    if isinstance(value, tuple) and name in ("values", "indices", "min", "max") and hasattr(value, name):
        return getattr(value, name)  # of what torch.max and the like return
    raise Refused(f"a custom loss may not read {str(name)[:60]!r} of a {type(value).__name__}")


def _get_item(value: Any, index: Any) -> Any:
    if isinstance(index, list) and not all(isinstance(each, int) for each in index):
        raise Refused("a list in an index must be one of whole numbers")
    if isinstance(value, Tensor) or (isinstance(value, list | tuple) and isinstance(index, int | slice)):
        return value[index]
    raise Refused(f"a {type(value).__name__} has no items")


def _norm(value: Any, p: Any = "fro", *args: Any, **kwargs: Any) -> Any:
    if not isinstance(p, int | float) and p not in ("fro", None):
        raise Refused("it takes a number for p here, or 'fro'; others need a decomposition")
    return torch.norm(value, p, *args, **kwargs)


def _method(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def call(value: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(value, Tensor):
            raise Refused(f"it is a method of tensors, and this is a {type(value).__name__}")
        return run(value, *args, **kwargs)

    return call


def _functions() -> Mapping[str, Operation]:
    """By qualified name."""
    found: dict[str, Operation] = {
        "getattr": Operation(_get_attribute, costs.free),
        "operator.getitem": Operation(_get_item, costs.item),
        "operator.matmul": Operation(operator.matmul, costs.matrix_product(operator.matmul)),
        "torch.where": Operation(torch.where, costs.where),
        "torch.nonzero": Operation(torch.nonzero, costs.positions),
        "torch.einsum": Operation(torch.einsum, costs.einsum),
        "torch.functional.einsum": Operation(torch.einsum, costs.einsum),
        "torch.repeat_interleave": Operation(
            torch.repeat_interleave, costs.repeated(torch.repeat_interleave)
        ),
        "torch._C._nn.one_hot": Operation(F.one_hot, costs.one_hot),
        "torch.nn.functional.one_hot": Operation(F.one_hot, costs.one_hot),
        "torch.numel": Operation(torch.numel, costs.free),
        "torch.norm": Operation(_norm, costs.no_more),
        "torch.functional.norm": Operation(_norm, costs.no_more),
        "torch._C._linalg.linalg_vector_norm": Operation(torch.linalg.vector_norm, costs.no_more),
    }
    for name in OPERATORS:
        found[f"operator.{name}"] = Operation(_number(name, getattr(operator, name)), costs.elementwise)
    for name in MATH:
        found[f"math.{name}"] = Operation(_number(name, getattr(math, name)), costs.free)
    for names, rule in _rules():
        for name in names:
            for module, place in (
                (torch, "torch"),
                (F, "torch.nn.functional"),
                (torch._C._nn, "torch._C._nn"),
                (torch.functional, "torch.functional"),
                (torch._C._special, "torch._C._special"),  # type: ignore[attr-defined]
                (torch._C._linalg, "torch._C._linalg"),  # type: ignore[attr-defined]
            ):
                run = getattr(module, name, None)
                if callable(run):
                    found.setdefault(f"{place}.{name}", Operation(run, rule(run)))
    return found


def _methods() -> Mapping[str, Operation]:
    found = {
        "where": Operation(_method("where", Tensor.where), costs.where),
        "nonzero": Operation(_method("nonzero", Tensor.nonzero), costs.positions),
        "norm": Operation(_method("norm", _norm), costs.no_more),
        "numel": Operation(_method("numel", Tensor.numel), costs.free),
        "expand": Operation(_method("expand", Tensor.expand), costs.shaped(Tensor.expand)),
        "repeat_interleave": Operation(
            _method("repeat_interleave", Tensor.repeat_interleave), costs.repeated(Tensor.repeat_interleave)
        ),
    }
    every = [*_rules(), *(([name], lambda _, rule=rule: rule) for name, rule in METHODS.items())]
    every.append((NEW, costs.shaped))
    for names, rule in every:
        for name in names:
            run = getattr(Tensor, name, None)
            if callable(run):
                found.setdefault(name, Operation(_method(name, run), rule(run)))
    return found


def _rules() -> Iterable[tuple[list[str], Callable[[Callable[..., Any]], Rule]]]:
    yield ELEMENTWISE, lambda _: costs.elementwise
    yield NO_MORE, lambda _: costs.no_more
    yield VIEWS, lambda _: costs.no_more
    yield LIKE, lambda _: costs.no_more
    yield BY_SHAPE, costs.shaped
    yield PRODUCTS, costs.matrix_product
    yield FROM_SIZES, costs.created


FUNCTIONS = _functions()
METHODS_OF_TENSORS = _methods()

# Arguments that would make an operation another one: write elsewhere, draw, or join the tape.
FORBIDDEN_ARGUMENTS = frozenset({"out", "generator", "requires_grad", "pin_memory", "layout", "names"})
