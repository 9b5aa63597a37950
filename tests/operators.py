"""Operators and modules of PyTorch whose derivatives of derivatives are checked.

An operator is a function of x, float64 `[3, 4, 4]`: examples, channels and positions, or square matrices. A
module comes with what makes its arguments of x.
"""

from operator import methodcaller

import torch
from torch import nn
from torch.func import hessian, jacfwd, jacrev, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations

aten, linalg, special = torch.ops.aten, torch.linalg, torch.special
EYE = torch.eye(4, dtype=torch.float64)
COLUMNS = torch.tensor([[0, 2, 1], [3, 1, 0], [1, 0, 2]])  # distinct in a row
CLASSES = torch.arange(12).view(3, 4) % 4
LAST = COLUMNS[:, None].expand(3, 4, 3)  # for the last axis of x


def regular(x):
    return 0.5 * x + 3 * EYE


def definite(x):
    return x @ x.mT + 2 * EYE


def symmetric(x):
    return x + x.mT + torch.diag(torch.arange(4.0, dtype=x.dtype)) * 3


def positive(x):
    return x.abs() + 0.5


def bounded(x):
    return 0.9 * x.tanh()


def other(x):
    return x.roll(1, 0)


def per_point(derivative, layer=torch.tanh):
    """Return a function of x that differentiates a small network in its inputs, at each of some points."""
    return lambda x: vmap(derivative(lambda point: torch.tanh(layer(x[0] @ point) @ x[2]).sum()))(x[1])


def normalised(x):
    return F.layer_norm(x, (4,))


def solved(x):
    matrix = 3 * EYE + torch.outer(x.tanh(), x.cos())
    return linalg.solve(matrix, x) * linalg.slogdet(matrix).logabsdet


def image(x):
    return x[:, None]


def heads(x):
    return image(x), image(other(x)), image(x) ** 2


NO_STATISTICS = (None, None, True, 0.1, 1e-5)  # running mean and variance; training, momentum, eps
NORMS = {
    "F.layer_norm": lambda x: F.layer_norm(x, (4,), x[0, 0], x[0, 1]),
    "torch.layer_norm": lambda x: torch.layer_norm(x, (4,), x[0, 0], x[0, 1]),
    "aten.layer_norm": lambda x: aten.layer_norm(x, (4,), x[0, 0], x[0, 1], 1e-5, False),
    "torch.native_layer_norm": lambda x: torch.native_layer_norm(x, (4,), x[0, 0], x[0, 1], 1e-5)[0],
    "F.batch_norm": lambda x: F.batch_norm(x, None, None, x[0, 0], x[0, 1], True),
    "torch.batch_norm": lambda x: torch.batch_norm(x, x[0, 0], x[0, 1], *NO_STATISTICS, True),
    "aten.batch_norm": lambda x: aten.batch_norm(x, x[0, 0], x[0, 1], *NO_STATISTICS, False),
    "torch.native_batch_norm": lambda x: torch.native_batch_norm(x, x[0, 0], x[0, 1], *NO_STATISTICS)[0],
    "aten._native_batch_norm_legit": lambda x: aten._native_batch_norm_legit(
        x, x[0, 0], x[0, 1], *NO_STATISTICS[2:]
    )[0],
    "F.instance_norm": lambda x: F.instance_norm(x, weight=x[0, 0], bias=x[0, 1]),
    "torch.instance_norm": lambda x: torch.instance_norm(x, x[0, 0], x[0, 1], *NO_STATISTICS, False),
    "torch.group_norm": lambda x: torch.group_norm(x, 2, x[0, 0], x[0, 1]),
    "torch.rms_norm": lambda x: torch.rms_norm(x, (4,), x[0, 0]),
    "F.local_response_norm": lambda x: F.local_response_norm(x, 2),
    "F.normalize": lambda x: F.normalize(x, dim=-1),
    "torch._weight_norm": lambda x: torch._weight_norm(x, x[:, :1, :1] + 1, 0),
}
ATTENTION = {
    "F.scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(*heads(x)),
    "aten.scaled_dot_product_attention": lambda x: aten.scaled_dot_product_attention(*heads(x)),
    "F.embedding": lambda x: F.embedding(COLUMNS, x[0]),
    "torch.embedding": lambda x: torch.embedding(x[0], COLUMNS),
    "F.embedding_bag": lambda x: F.embedding_bag(COLUMNS, x[0]),
    "F.one_hot": lambda x: F.one_hot(CLASSES, 4) * x,
    "torch.dropout": lambda x: torch.dropout(x, 0.3, True),
}
LINEAR_ALGEBRA = {
    "linalg.det": lambda x: linalg.det(regular(x)),
    "torch.det": lambda x: torch.det(regular(x)),
    "linalg.slogdet": lambda x: linalg.slogdet(regular(x)).logabsdet,
    "torch.slogdet": lambda x: torch.slogdet(regular(x))[1],
    "torch.logdet": lambda x: definite(x).logdet(),
    "linalg.solve": lambda x: linalg.solve(regular(x), other(x)),
    "linalg.solve, vectors": lambda x: linalg.solve(regular(x), x[:, 0]),
    "linalg.solve, left=False": lambda x: linalg.solve(regular(x), other(x), left=False),
    "linalg.solve_ex": lambda x: linalg.solve_ex(regular(x), other(x)).result,
    "linalg.tensorsolve": lambda x: linalg.tensorsolve(regular(x[0]).view(2, 2, 2, 2), x[1, :1].view(2, 2)),
    "linalg.tensorinv": lambda x: linalg.tensorinv(regular(x[0]).view(2, 2, 2, 2)),
    "linalg.inv": lambda x: linalg.inv(regular(x)),
    "linalg.pinv": lambda x: linalg.pinv(regular(x)[..., :3]),
    "linalg.lstsq": lambda x: linalg.lstsq(regular(x)[..., :3], x)[0],
    "linalg.cholesky": lambda x: linalg.cholesky(definite(x)),
    "torch.cholesky_solve": lambda x: torch.cholesky_solve(other(x), linalg.cholesky(definite(x))),
    "torch.cholesky_inverse": lambda x: torch.cholesky_inverse(linalg.cholesky(definite(x))),
    "linalg.lu": lambda x: linalg.lu(regular(x))[1:],
    "linalg.lu_solve": lambda x: linalg.lu_solve(*linalg.lu_factor(regular(x)), other(x)),
    "linalg.solve_triangular": lambda x: linalg.solve_triangular(regular(x).triu(), other(x), upper=True),
    "torch.triangular_solve": lambda x: torch.triangular_solve(other(x), regular(x))[0],
    "linalg.qr": lambda x: tuple(linalg.qr(regular(x))),
    "linalg.eigh, values": lambda x: linalg.eigh(symmetric(x))[0],
    "linalg.eigh, vectors": lambda x: linalg.eigh(symmetric(x))[1].abs(),
    "linalg.eigvals": lambda x: linalg.eigvals(regular(x)).abs(),
    "linalg.svd": lambda x: linalg.svd(symmetric(x))[1],
    "linalg.matrix_exp": lambda x: linalg.matrix_exp(x),
    "linalg.matrix_power": lambda x: linalg.matrix_power(regular(x), -2),
    "linalg.matrix_norm": lambda x: linalg.matrix_norm(x),
    "linalg.vector_norm": lambda x: linalg.vector_norm(x, 3, dim=-1),
    "linalg.householder_product": lambda x: linalg.householder_product(x, 0.1 * x[:, 0]),
    "torch.cdist": lambda x: torch.cdist(x, other(x) + 1),
    "torch.cdist, p=1": lambda x: torch.cdist(x, other(x) + 1, p=1.0),
    "F.pdist": lambda x: F.pdist(x[0]),
    "F.pairwise_distance": lambda x: F.pairwise_distance(x, other(x) + 1),
    "F.cosine_similarity": lambda x: F.cosine_similarity(x, other(x) + 1, dim=-1),
    "torch.einsum": lambda x: torch.einsum("bij,bjk->bik", x, x),
    "torch.kron": lambda x: torch.kron(x[0], x[1]),
    "F.bilinear": lambda x: F.bilinear(x[:, 0], x[:, 1], x),
}
REDUCTIONS = {
    **{name: methodcaller(name, -1) for name in ("softmax", "log_softmax", "logsumexp", "logcumsumexp")},
    **{name: methodcaller(name, -1) for name in ("cumsum", "cumprod", "prod")},
    "var_mean": lambda x: torch.var_mean(x, -1),
    "std": lambda x: x.std(-1),
    "cov": lambda x: torch.cov(x[0]),
    "max": lambda x: x.max(-1).values,
    "sort": lambda x: x.sort(-1).values,
    "topk": lambda x: x.topk(2, -1).values,
    "median": lambda x: x.median(-1).values,
    "quantile": lambda x: x.quantile(0.3, dim=-1),
    "cummax": lambda x: x.cummax(-1).values,
}
CONVOLUTIONS = {
    "F.conv1d": lambda x: F.conv1d(x, x[:, :, :3], padding=1),
    "F.conv1d, groups": lambda x: F.conv1d(x, x[0, :, None, :3], groups=4),
    "F.conv2d": lambda x: F.conv2d(image(x), x[:2, None, :3, :3], padding=1),
    "F.conv3d": lambda x: F.conv3d(x[None, None], x[None, None, :2, :2, :2]),
    "F.conv_transpose2d": lambda x: F.conv_transpose2d(image(x), x[:1, None, :2, :2]),
    "F.unfold": lambda x: F.unfold(image(x), 2),
    "F.fold": lambda x: F.fold(x, (3, 3), (2, 2)),
    "F.avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "F.max_pool2d": lambda x: F.max_pool2d(x, 2),
    "F.max_pool1d": lambda x: F.max_pool1d(x, 2),
    "F.lp_pool2d": lambda x: F.lp_pool2d(positive(x), 3, 2),
    "F.adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 2),
    "F.adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
    "F.interpolate": lambda x: F.interpolate(image(x), scale_factor=2, mode="bilinear"),
    "F.grid_sample": lambda x: F.grid_sample(image(x), bounded(x[..., :2])[:, :, None], align_corners=False),
    "F.pixel_shuffle": lambda x: F.pixel_shuffle(x[:, :, None], 2),
    "F.pad": lambda x: F.pad(x, (1, 1), mode="reflect"),
    "torch.fft.rfft": lambda x: torch.view_as_real(torch.fft.rfft(x)),
    "torch.complex": lambda x: torch.complex(x, other(x)).exp().abs(),
}
ELEMENTWISE = {
    "F.relu": F.relu,
    "F.leaky_relu": F.leaky_relu,
    "F.prelu": lambda x: F.prelu(x, x[0, 0]),
    **{f"F.{n}": getattr(F, n) for n in ("elu", "selu", "gelu", "silu", "mish", "softplus", "hardswish")},
    "F.hardsigmoid": F.hardsigmoid,
    "aten.hardsigmoid": aten.hardsigmoid,
    "F.logsigmoid": F.logsigmoid,
    "F.glu": F.glu,
    "aten.glu": aten.glu,
    **{name: getattr(torch, name) for name in ("sigmoid", "tanh", "sin", "exp")},
    "log": lambda x: positive(x).log(),
    "sqrt": lambda x: positive(x).sqrt(),
    "pow": lambda x: positive(x) ** x,
    "erf": torch.erf,
    "lgamma": lambda x: positive(x).lgamma(),
    "digamma": lambda x: positive(x).digamma(),
    "special.erfcx": lambda x: special.erfcx(positive(x)),
    "special.zeta": lambda x: special.zeta(2.0, positive(x)),
    "igamma": lambda x: torch.igamma(torch.ones_like(x), positive(x)),
    "atan2": lambda x: torch.atan2(x, other(x)),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "maximum": lambda x: torch.maximum(x, other(x)),
    "where": lambda x: torch.where(x > 0, x**2, x),
    "lerp": lambda x: torch.lerp(x, other(x), x.roll(1, 1)),
}
INDEXING = {
    "gather": lambda x: x.gather(-1, LAST),
    "scatter": lambda x: x.scatter(-1, LAST, x[..., :3] * 2),
    "scatter_add": lambda x: torch.zeros_like(x).scatter_add(-1, LAST, x[..., :3]),
    "scatter_reduce, mean": lambda x: torch.ones_like(x).scatter_reduce(-1, LAST, x[..., :3], "mean"),
    "scatter_reduce, prod": lambda x: torch.ones_like(x).scatter_reduce(-1, LAST, x[..., :3], "prod"),
    "index_add": lambda x: x.index_add(1, COLUMNS[0], x[:, :3]),
    "index_copy": lambda x: x.index_copy(1, COLUMNS[0], x[:, :3] ** 2),
    "select_scatter": lambda x: x.select_scatter(x[:, 0] ** 2, 1, -1),
    "slice_scatter": lambda x: x.slice_scatter(x[:2] ** 2, 0, 1),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
    "x[rows, columns]": lambda x: x[COLUMNS[0], COLUMNS[1]],
    "tril": lambda x: x.tril(),
    "diag_embed": lambda x: x.diag_embed(),
}
LOSSES = {
    "F.mse_loss": lambda x: F.mse_loss(x, other(x)),
    "F.smooth_l1_loss": lambda x: F.smooth_l1_loss(x, other(x)),
    "F.huber_loss": lambda x: F.huber_loss(x, other(x)),
    "F.cross_entropy": lambda x: F.cross_entropy(x, CLASSES, label_smoothing=0.1),
    "F.binary_cross_entropy": lambda x: F.binary_cross_entropy(x.sigmoid(), other(x).sigmoid()),
    "F.kl_div": lambda x: F.kl_div(x.log_softmax(-1), other(x).softmax(-1)),
    "F.gaussian_nll_loss": lambda x: F.gaussian_nll_loss(x, other(x), positive(x)),
    "F.triplet_margin_loss": lambda x: F.triplet_margin_loss(x[0], x[1], x[2]),
    "F.multi_margin_loss": lambda x: F.multi_margin_loss(x[0], CLASSES[0]),
    "F.ctc_loss": lambda x: F.ctc_loss(
        x.log_softmax(-1).transpose(0, 1), CLASSES[:, 1:2], torch.full((3,), 4), torch.ones(3).long()
    ),
}
TRANSFORMS = {
    "vmap(grad)": per_point(torch.func.grad),
    "vmap(jacrev)": per_point(jacrev),
    "vmap(jacfwd)": per_point(jacfwd),
    "vmap(hessian)": per_point(hessian),
    "vmap(hessian) of linalg.solve": per_point(hessian, solved),
    "vmap(jacrev) of a layer norm": per_point(jacrev, normalised),
    "vmap(hessian) of a layer norm": per_point(hessian, normalised),
}
OPERATORS = NORMS | ATTENTION | LINEAR_ALGEBRA | REDUCTIONS | CONVOLUTIONS
OPERATORS |= ELEMENTWISE | INDEXING | LOSSES | TRANSFORMS


# ---- modules: what builds one, and what makes its arguments of x ---------------------------------


def in_order(x):
    return x


def volumes(x):
    return x[None, None]


def tokens(x):
    return x, other(x)


def words(x):
    return CLASSES


def cell_of_two(x):
    return x[:, 0], (x[:, 1], x[:, 2])


def orthogonal(map_name):
    return parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map=map_name)


MODULES = {
    "Linear": (lambda: nn.Linear(4, 3), in_order),
    "Bilinear": (lambda: nn.Bilinear(4, 4, 3), tokens),
    "Conv1d": (lambda: nn.Conv1d(4, 2, 3), in_order),
    "Conv2d": (lambda: nn.Conv2d(1, 2, 3, padding=1), image),
    "Conv3d": (lambda: nn.Conv3d(1, 2, 2), volumes),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(1, 2, 2), image),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4, track_running_stats=False), in_order),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(1, track_running_stats=False), image),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(1, track_running_stats=False), volumes),
    "LayerNorm": (lambda: nn.LayerNorm(4), in_order),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), in_order),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True), in_order),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(1, affine=True), image),
    "RMSNorm": (lambda: nn.RMSNorm(4), in_order),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), in_order),
    "PReLU": (lambda: nn.PReLU(4), in_order),
    "GLU": (lambda: nn.GLU(), in_order),
    "Hardswish": (lambda: nn.Hardswish(), in_order),
    "Hardsigmoid": (lambda: nn.Hardsigmoid(), in_order),
    "GELU": (lambda: nn.GELU(), in_order),
    "Softmax": (lambda: nn.Softmax(-1), in_order),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), image),
    "AvgPool2d": (lambda: nn.AvgPool2d(2), image),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(1), image),
    "Upsample": (lambda: nn.Upsample(scale_factor=2), image),
    "PixelShuffle": (lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.PixelShuffle(2)), image),
    "Embedding": (lambda: nn.Embedding(4, 3), words),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(4, 3), words),
    "Dropout": (lambda: nn.Dropout(0.3), in_order),
    "Dropout2d": (lambda: nn.Dropout2d(0.3), image),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.3), in_order),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2), lambda x: (x, other(x), x**2)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.2), in_order),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(4, 2, 6, 0.2), tokens),
    "Transformer": (lambda: nn.Transformer(4, 2, 1, 1, 6, 0.2), tokens),
    "RNN": (lambda: nn.RNN(4, 3), in_order),
    "LSTM": (lambda: nn.LSTM(4, 3, bidirectional=True), in_order),
    "GRU": (lambda: nn.GRU(4, 3, num_layers=2), in_order),
    "LSTMCell": (lambda: nn.LSTMCell(4, 4), cell_of_two),
    "GRUCell": (lambda: nn.GRUCell(4, 4), lambda x: (x[:, 0], x[:, 1])),
    "parametrizations.weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), in_order),
    "parametrizations.orthogonal": (lambda: orthogonal(None), in_order),
    "parametrizations.orthogonal, Cayley": (lambda: orthogonal("cayley"), in_order),
    "parametrizations.orthogonal, matrix_exp": (lambda: orthogonal("matrix_exp"), in_order),
}
