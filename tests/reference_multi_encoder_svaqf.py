"""Replays of Cambrian-1's spatial vision aggregator: its sampler, and the connector up to the embedded prompt."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vitweave.modeling.conversion.cambrian import PROJECTION, SAMPLER
from vitweave.modeling.conversion.release import Part, converted, place
from vitweave.modeling.encoder_fusion.base import EncoderMaps
from vitweave.modeling.encoder_fusion.spatial_vision_aggregator import SpatialVisionAggregatorFusion
from vitweave.modeling.sva_layers import SpatialVisionSampler
from vitweave.modeling.visible_tokens import add_newlines

CONNECTOR_PARTS = [
    Part("vision_query", "query"),
    Part("mm_projector_aux_", "projections.", PROJECTION),
    Part("vision_sampler_", "samplers.", SAMPLER),
]
AFTER_THE_CONNECTOR = ("mm_projector.", "image_newline", "embed_tokens.")


def replay_sampler(case):
    facts = case.sidecar["args"]
    sampler = SpatialVisionSampler(
        facts["num_of_layers"],
        facts["q_dim"],
        facts["context_dim"],
        facts["kv_dim_list"],
        [side * side for side in facts["kv_size_list"]],
        facts["vision_hidden_size"],
        case.sidecar["num_heads"],
        facts["layer_type"],
    )
    state = converted([Part("", "", SAMPLER)], case.group("state"))
    sampler.to(case.dtype).load_state_dict(state, strict=True)
    given, maps = case.group("input"), range(len(facts["kv_size_list"]))
    windows = [given[f"latents_{index}"][:, None] for index in maps]  # one position per query
    mask = torch.cat([given[f"mask_{index}"] for index in maps], dim=1).bool()[:, None]
    case.check("output.queries_out", sampler.eval()(given["queries"], given["context"], windows, mask))
    if len(given["queries"]) % 2 == 0:  # the same as positions of two images
        together = [part.unflatten(0, (2, -1)).squeeze(2) for part in (given["queries"], given["context"], *windows)]
        found = sampler(*together[:2], together[2:], mask.unflatten(0, (2, -1)).squeeze(2))
        case.check("output.queries_out", found.flatten(0, 1)[:, None])


def connector_maps(case) -> EncoderMaps:
    """The features of the towers as maps; the sidecar's image sizes are (width, height)."""
    maps = []
    for index, side in enumerate(case.sidecar["tower_sides"]):
        tokens = case.tensors[f"input.tower_features_{index}"]
        maps.append(tokens.transpose(1, 2).unflatten(2, (side, side)))
    sizes = torch.tensor(case.sidecar["original_image_sizes_width_height"]).flip(1)
    return EncoderMaps(maps, image_sizes=sizes)


def embedded_prompt(ids: Tensor, image_tokens: list[Tensor], table: Tensor, image_id: int) -> Tensor:
    """The prompts with the tokens of their image in place of its index, padded with zeros on the right."""
    rows = []
    for row, tokens in zip(ids, image_tokens, strict=True):
        before, after = row[: row.tolist().index(image_id)], row[row.tolist().index(image_id) + 1 :]
        rows.append(torch.cat([table[before], tokens, table[after]]))
    return pad_sequence(rows, batch_first=True)


def replay_connector(case):
    facts, state = case.sidecar, case.group("state")
    features = connector_maps(case)
    fusion = SpatialVisionAggregatorFusion(
        facts["tower_hidden"],
        [tuple(part.shape[-2:]) for part in features.maps],
        query_sides=[round(number**0.5) for number in facts["query_num_list"]],
        final_side=facts["final_side"],
        vision_hidden_size=facts["vision_hidden_size"],
        depth=facts["connector_depth"],
        num_heads=facts.get("num_heads", 16),
    )
    own = converted(CONNECTOR_PARTS, state)
    assert all(name.startswith(AFTER_THE_CONNECTOR) for name in place(CONNECTOR_PARTS, state).unknown)
    fusion.to(case.dtype).load_state_dict(own, strict=True)
    projector = torch.nn.Sequential(
        torch.nn.Linear(fusion.hidden_size, facts["llm_hidden_size"]),
        torch.nn.GELU(),
        torch.nn.Linear(facts["llm_hidden_size"], facts["llm_hidden_size"]),
    ).to(case.dtype)
    projector.load_state_dict(
        {n.removeprefix("mm_projector."): t for n, t in state.items() if n.startswith("mm_projector.")}
    )
    tokens = projector(fusion.eval()(features))
    assert tokens.shape[1] == fusion.num_tokens
    images = add_newlines(tokens, features.image_sizes, state["image_newline"])
    for index, (tokens, (height, width)) in enumerate(
        zip(images, facts["final_height_width_after_unpad"], strict=True)
    ):
        assert tokens.shape[0] == height * (width + 1)
        case.check(f"output.image_tokens_{index}", tokens)
    table, ids = state["embed_tokens.weight"], case.tensors["input.input_ids"]
    prompt = embedded_prompt(ids, images, table, facts["image_token_index"])
    case.check("output.inputs_embeds_right_padded", prompt)


KINDS = {"cambrian_sva_sampler": replay_sampler, "cambrian_sva_connector": replay_connector}
