"""Segmenters with the tensor names of NVlabs/SegFormer, huaaaliu/RGBX_Semantic_Segmentation (CMX),
JiaDingCN/GeminiFusion and yikaiw/TokenFusion, at a small width: random tensors, and what the first two compute, written
from their formulas."""

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS, DEPTHS, HEADS, RATIOS = (16, 32, 80, 128), (1, 1, 2, 1), (1, 2, 5, 8), (8, 4, 2, 1)
DECODER, LABELS = 24, 7
Shapes = dict[str, tuple[int, ...]]


def layer(name: str, *weight: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": weight, **({f"{name}.bias": weight[:1]} if bias else {})}


def batch_norm(name: str, width: int) -> Shapes:
    return (
        layer(name, width)
        | {f"{name}.{leaf}": (width,) for leaf in ("running_mean", "running_var")}
        | {f"{name}.num_batches_tracked": ()}
    )


def norm(name: str, width: int, rows: int = 0) -> Shapes:
    """One, or `rows` of them, one per modality."""
    names = [f"{name}.ln_{row}" for row in range(rows)] or [name]
    return {key: shape for each in names for key, shape in layer(each, width).items()}


def mit(root: str = "", wrap: str = "", rows: int = 0, images: int = 0, gemini: bool = False) -> Shapes:
    """
    Args:
        root: what stands in front of patch_embed1, block1, norm1.
        wrap: what stands behind shared layers.
        rows, images: norms of a block, and of a patch embedding.
        gemini: with a GeminiFusion in every block.
    """
    shapes: Shapes = {}
    for number, (width, depth, ratio) in enumerate(zip(WIDTHS, DEPTHS, RATIOS, strict=True), start=1):
        read, kernel = (3, 7) if number == 1 else (WIDTHS[number - 2], 3)
        shapes |= layer(f"{root}patch_embed{number}.proj{wrap}", width, read, kernel, kernel)
        shapes |= norm(f"{root}patch_embed{number}.norm", width, images) | norm(f"{root}norm{number}", width, rows)
        for block in range(depth):
            name = f"{root}block{number}.{block}."
            shapes |= norm(name + "norm1", width, rows) | norm(name + "norm2", width, rows)
            shapes |= layer(f"{name}attn.q{wrap}", width, width) | layer(f"{name}attn.kv{wrap}", 2 * width, width)
            shapes |= layer(f"{name}attn.proj{wrap}", width, width) | layer(f"{name}mlp.fc1{wrap}", 2 * width, width)
            shapes |= layer(f"{name}mlp.dwconv.dwconv", 2 * width, 1, 3, 3)
            shapes |= layer(f"{name}mlp.fc2{wrap}", width, 2 * width)
            if ratio > 1:
                shapes |= layer(f"{name}attn.sr{wrap}", width, width, ratio, ratio)
                shapes |= norm(name + "attn.norm", width, rows)
            if gemini:
                shapes |= units(name + "attn.", width)
    return shapes


def units(name: str, width: int) -> Shapes:
    """A GeminiFusion."""
    shapes = layer(name + "relation_judger.0.fc1", width, 2 * width) | layer(
        name + "relation_judger.0.fc2", width, width
    )
    for unit in ("cross_attn_0_to_1", "cross_attn_1_to_0"):
        shapes |= layer(f"{name}{unit}.out_proj", width, width)
        shapes |= {f"{name}{unit}.in_proj_weight": (3 * width, width), f"{name}{unit}.in_proj_bias": (3 * width,)}
    return shapes | {f"{name}{kind}_noise.weight": (2, width) for kind in "kv"}


def decoder(head: str, conv: str, norm: str, bias: bool = False, widths=WIDTHS) -> Shapes:
    shapes = layer(f"{head}linear_pred", LABELS, DECODER, 1, 1) | batch_norm(head + norm, DECODER)
    shapes |= layer(head + conv, DECODER, 4 * DECODER, 1, 1, bias=bias)
    for number, width in enumerate(widths, start=1):
        shapes |= layer(f"{head}linear_c{number}.proj", DECODER, width)
    return shapes


def fusion(stage: int, width: int) -> Shapes:
    gates, fuse = f"backbone.FRMs.{stage}.", f"backbone.FFMs.{stage}."
    shapes = layer(gates + "channel_weights.mlp.0", 4 * width, 4 * width)
    shapes |= layer(gates + "channel_weights.mlp.2", 2 * width, 4 * width)
    shapes |= layer(gates + "spatial_weights.mlp.0", width, 2 * width, 1, 1)
    shapes |= layer(gates + "spatial_weights.mlp.2", 2, width, 1, 1)
    for side in (1, 2):
        shapes |= layer(f"{fuse}cross.channel_proj{side}", 2 * width, width)
        shapes |= layer(f"{fuse}cross.cross_attn.kv{side}", 2 * width, width, bias=False)
        shapes |= layer(f"{fuse}cross.end_proj{side}", width, 2 * width) | layer(f"{fuse}cross.norm{side}", width)
    embed = fuse + "channel_emb."
    shapes |= layer(embed + "residual", width, 2 * width, 1, 1, bias=False)
    shapes |= layer(embed + "channel_embed.0", width, 2 * width, 1, 1)
    shapes |= layer(embed + "channel_embed.1", width, 1, 3, 3) | layer(embed + "channel_embed.3", width, width, 1, 1)
    return shapes | batch_norm(embed + "channel_embed.4", width) | batch_norm(embed + "norm", width)


def random_state(shapes: Shapes) -> dict[str, Tensor]:
    generator, state = torch.Generator().manual_seed(11), {}
    for name, shape in shapes.items():
        values = 0.2 * torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            values = torch.tensor(3)
        elif name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            values = 0.05 + values.abs() if name.endswith("running_var") else 1 + values
        state[name] = values
    return state


def segformer() -> dict[str, Tensor]:
    unused = layer("decode_head.conv_seg", LABELS, 9, 1, 1)
    return random_state(mit("backbone.") | decoder("decode_head.", "linear_fuse.conv", "linear_fuse.bn") | unused)


def imagenet_mit() -> dict[str, Tensor]:
    return random_state(mit() | layer("head", 10, WIDTHS[-1]))


def cmx() -> dict[str, Tensor]:
    shapes = mit("backbone.") | mit("backbone.extra_")
    shapes |= decoder("decode_head.", "linear_fuse.0", "linear_fuse.1", bias=True)
    for stage, width in enumerate(WIDTHS):
        shapes |= fusion(stage, width)
    return random_state(shapes)


def gemini_fusion() -> dict[str, Tensor]:
    shapes = mit("encoder.", ".module", rows=2, images=2, gemini=True) | {"alpha": (2,)}
    return random_state(shapes | decoder("decoder.", "linear_fuse.conv", "linear_fuse.bn"))


def gemini_fusion_deliver(modalities: int) -> dict[str, Tensor]:
    shapes = mit("backbone.", ".module", rows=2, images=modalities, gemini=True) | {"alpha": (2,)}
    for stage, width in enumerate(WIDTHS if modalities > 2 else ()):
        for net in range(modalities):  # one more than there are sensors to merge
            name = f"backbone.extra_score_predictor.{stage}.score_nets.{net}."
            shapes |= layer(name + "0", width, 1, 3, 3) | layer(name + "1", 1, width, 1, 1)
    return random_state(shapes | decoder("decode_head.", "linear_fuse.conv", "linear_fuse.bn"))


def token_fusion() -> dict[str, Tensor]:
    shapes = mit("encoder.", ".module", rows=2, images=2) | {"alpha": (2,)}
    for stage, width in enumerate(WIDTHS):
        for row in range(2):
            name = f"encoder.score_predictor.{stage}.score_nets.{row}."
            shapes |= layer(name + "0", width) | layer(name + "1", width, width)
            shapes |= layer(name + "3", width // 2, width) | layer(name + "5", width // 4, width // 2)
            shapes |= layer(name + "7", 2, width // 4)
    return random_state(shapes | decoder("decoder.", "linear_fuse.conv", "linear_fuse.bn"))


def gemini_fusion_swin() -> dict[str, Tensor]:
    body, widths, window = "encoder.body.", (16, 32, 64, 128), 3
    shapes = layer(body + "patch_embed.proj.module", 16, 3, 4, 4) | norm(body + "patch_embed.norm", 16, 2)
    shapes |= decoder("decoder.", "linear_fuse.conv", "linear_fuse.bn", widths=widths) | {"alpha": (2,)}
    for stage, (width, depth) in enumerate(zip(widths, (2, 1, 1, 1), strict=True)):
        shapes |= norm(f"{body}norm{stage}", width, 2)
        for block in range(depth):
            name = f"{body}layers.{stage}.blocks.{block}."
            shapes |= layer(name + "norm1.module", width) | layer(name + "norm2.module", width)
            shapes |= layer(name + "attn.module.qkv", 3 * width, width) | layer(name + "attn.module.proj", width, width)
            shapes |= {name + "attn.module.relative_position_bias_table": ((2 * window - 1) ** 2, 2**stage)}
            shapes |= {name + "attn.module.relative_position_index": (window**2, window**2)}
            shapes |= layer(name + "mlp.fc1.module", 2 * width, width)
            shapes |= layer(name + "mlp.fc2.module", width, 2 * width) | units(name, width)
        if stage < 3:
            merging = f"{body}layers.{stage}.downsample.module."
            shapes |= layer(merging + "norm", 4 * width)
            shapes |= layer(merging + "reduction", 2 * width, 4 * width, bias=False)
    rows, columns = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
    down, right = (side[:, None] - side[None] + window - 1 for side in (rows, columns))
    state = random_state(shapes)
    return {
        name: down * (2 * window - 1) + right if name.endswith("index") else tensor for name, tensor in state.items()
    }


# What they compute ---------------------------------------------------------------------------------------------------


class Official:
    """The tensors of a model, and its layers as functions."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[name + ".weight"], self.state.get(name + ".bias"))

    def conv(self, name: str, x: Tensor, **options) -> Tensor:
        return F.conv2d(x, self.state[name + ".weight"], self.state.get(name + ".bias"), **options)

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        weight, bias = self.state[name + ".weight"], self.state[name + ".bias"]
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def batch_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        leaves = [self.state[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *leaves, eps=eps)

    def stage(self, root: str, number: int, maps: Tensor) -> Tensor:
        """Of one MiT: 1e-6 in the norms of blocks and stages, 1e-5 behind strided convolutions."""
        kernel = 7 if number == 1 else 3
        name, options = f"{root}patch_embed{number}", {"stride": 4 if number == 1 else 2, "padding": kernel // 2}
        maps = self.conv(f"{name}.proj", maps, **options)
        grid, tokens = maps.shape[2:], maps.flatten(2).transpose(1, 2)
        tokens = self.norm(f"{name}.norm", tokens, 1e-5)
        for block in range(DEPTHS[number - 1]):
            name = f"{root}block{number}.{block}"
            normed = self.norm(f"{name}.norm1", tokens, 1e-6)
            tokens = tokens + self.attention(f"{name}.attn", normed, grid, HEADS[number - 1], RATIOS[number - 1])
            hidden = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", tokens, 1e-6))
            wide = self.as_map(hidden, grid)
            wide = self.conv(f"{name}.mlp.dwconv.dwconv", wide, padding=1, groups=wide.shape[1])
            tokens = tokens + self.linear(f"{name}.mlp.fc2", F.gelu(wide.flatten(2).transpose(1, 2)))
        return self.as_map(self.norm(f"{root}norm{number}", tokens, 1e-6), grid)

    def attention(self, name: str, tokens: Tensor, grid: tuple[int, int], heads: int, ratio: int) -> Tensor:
        read = tokens
        if ratio > 1:
            read = self.conv(f"{name}.sr", self.as_map(tokens, grid), stride=ratio).flatten(2).transpose(1, 2)
            read = self.norm(f"{name}.norm", read, 1e-5)
        key, value = self.linear(f"{name}.kv", read).chunk(2, dim=-1)
        parts = [x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (self.linear(f"{name}.q", tokens), key, value)]
        return self.linear(f"{name}.proj", F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))

    @staticmethod
    def as_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, tuple(grid))

    def decode(self, maps: list[Tensor], conv: str, norm: str, eps: float) -> Tensor:
        projected = []
        for number in (4, 3, 2, 1):
            tokens = maps[number - 1].flatten(2).transpose(1, 2)
            hidden = self.as_map(self.linear(f"decode_head.linear_c{number}.proj", tokens), maps[number - 1].shape[2:])
            projected.append(F.interpolate(hidden, maps[0].shape[2:], mode="bilinear", align_corners=False))
        fused = self.batch_norm(f"decode_head.{norm}", self.conv(f"decode_head.{conv}", torch.cat(projected, 1)), eps)
        return self.conv("decode_head.linear_pred", fused.relu())

    def rectify(self, name: str, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([one, two], dim=1)
        pooled = torch.cat([both.mean(dim=(2, 3)), both.amax(dim=(2, 3))], dim=1)
        channels = self.linear(f"{name}.channel_weights.mlp.0", pooled).relu()
        channels = self.linear(f"{name}.channel_weights.mlp.2", channels).sigmoid()[:, :, None, None].chunk(2, dim=1)
        places = self.conv(f"{name}.spatial_weights.mlp.0", both).relu()
        places = self.conv(f"{name}.spatial_weights.mlp.2", places).sigmoid().chunk(2, dim=1)
        gates = [0.5 * channel + 0.5 * place for channel, place in zip(channels, places, strict=True)]
        return one + gates[1] * two, two + gates[0] * one

    def fuse(self, name: str, maps: list[Tensor], heads: int) -> Tensor:
        tokens, kept, queries, contexts = [x.flatten(2).transpose(1, 2) for x in maps], [], [], []
        for side, stream in enumerate(tokens, start=1):
            own, query = self.linear(f"{name}.cross.channel_proj{side}", stream).relu().chunk(2, dim=-1)
            key, value = self.linear(f"{name}.cross.cross_attn.kv{side}", query).chunk(2, dim=-1)
            query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
            kept.append(own), queries.append(query)
            contexts.append((key.mT @ value * query.shape[-1] ** -0.5).softmax(dim=-2))
        crossed = []
        for side, stream in enumerate(tokens, start=1):
            read = (queries[side - 1] @ contexts[2 - side]).transpose(1, 2).flatten(2)
            update = self.linear(f"{name}.cross.end_proj{side}", torch.cat([kept[side - 1], read], dim=-1))
            crossed.append(self.norm(f"{name}.cross.norm{side}", stream + update, 1e-5))
        both, name = self.as_map(torch.cat(crossed, dim=-1), maps[0].shape[2:]), f"{name}.channel_emb"
        narrow = self.conv(f"{name}.channel_embed.0", both)
        narrow = self.conv(f"{name}.channel_embed.1", narrow, padding=1, groups=narrow.shape[1]).relu()
        update = self.batch_norm(f"{name}.channel_embed.4", self.conv(f"{name}.channel_embed.3", narrow), 1e-5)
        return self.batch_norm(f"{name}.norm", self.conv(f"{name}.residual", both) + update, 1e-5)


def segformer_logits(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Images (batch, 3, height, width) to logits at a quarter of their size."""
    model, maps = Official(state), [images]
    for number in range(1, 5):
        maps.append(model.stage("backbone.", number, maps[-1]))
    return model.decode(maps[1:], "linear_fuse.conv", "linear_fuse.bn", 1e-5)


def cmx_logits(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Images (batch, 2, 3, height, width) to logits at a quarter of their size."""
    model, streams, fused = Official(state), list(images.unbind(1)), []
    for number in range(1, 5):
        roots = ("backbone.", "backbone.extra_")
        streams = [model.stage(root, number, stream) for root, stream in zip(roots, streams, strict=True)]
        streams = list(model.rectify(f"backbone.FRMs.{number - 1}", *streams))
        fused.append(model.fuse(f"backbone.FFMs.{number - 1}", streams, HEADS[number - 1]))
    return model.decode(fused, "linear_fuse.0", "linear_fuse.1", 1e-3)
