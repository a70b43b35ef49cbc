"""Multi-view and two-view models that are not of VGGT's code; diffusion; single-view originals."""

from __future__ import annotations

import copy
import importlib
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .model import Model, Run, pictures, shrunk, stub

WIDTH, HEADS = 64, 4
_TINY = {"embed_dim": WIDTH, "num_heads": HEADS}


def quiet(model: nn.Module, *layers: str, share: float = 0.05) -> nn.Module:
    """Scale what branches add, where no gate does it: a token stays itself through all blocks."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[0].rpartition(".")[2] in layers:
                parameter.mul_(share)
    return model


def draw_captured(model: nn.Module, images: Tensor, run: Run) -> str:
    """A figure of the last site that says where its tokens lie, from its last patch."""
    import vistvis
    from vggt_adapter import visualize_attention_on_image

    with torch.no_grad():
        captured = vistvis.capture(model, accumulate=True)
        try:
            run(model, images)
        finally:
            captured.remove()
    readings = [(run, len(captured[name])) for name in captured for run in captured[name][-1:]]
    attention, runs = next(
        (one, count)
        for one, count in reversed(readings)
        if one.site.query_layout and one.site.key_layout and one.site.kind != "window"
    )
    layout, order = attention.site.query_layout, attention.site.query_order
    tokens = range(layout.num_tokens) if order is None else sorted(order.tokens.flatten().tolist())
    token = [token for token in tokens if layout.locate(token).is_patch][-1]
    # A site that runs once for each picture was last run on the last one.
    shown = images[-1:] if layout.frames == 1 < len(images) == runs else images
    if shown.shape[-2:] != layout.image_size:
        shown = functional.interpolate(shown, size=layout.image_size)
    visualize_attention_on_image(attention, shown, token)
    return f"drawn from {attention.site.name}"


def run_batch(model: nn.Module, images: Tensor) -> object:
    """Pictures as one scene: `(1, S, 3, H, W)`."""
    return model(images[None])


# -- Pi3 -------------------------------------------------------------------------------------------


def build_pi3(folder: Path) -> nn.Module:
    home = "pi3.models"
    decoder = {"dec_embed_dim": WIDTH, "dec_num_heads": HEADS, "depth": 1}
    # The width of Pi3's decoder is one of three; the smallest is kept.
    vit = {"embed_dim": 384, "num_heads": 6, "depth": 2}
    with (
        shrunk(f"{home}.dinov2.models.vision_transformer", DinoVisionTransformer=vit),
        shrunk(f"{home}.pi3", TransformerDecoder=decoder) as module,
    ):
        model: nn.Module = module.Pi3(decoder_size="small")
    model.decoder = model.decoder[:4]  # type: ignore[index]
    return model


# -- Depth Anything 3 ------------------------------------------------------------------------------


def build_depth_anything(folder: Path) -> nn.Module:
    model = importlib.import_module("depth_anything_3.model.da3")
    head = importlib.import_module("depth_anything_3.model.dualdpt").DualDPT
    decoder = importlib.import_module("depth_anything_3.model.cam_dec").CameraDec
    encoder = importlib.import_module("depth_anything_3.model.cam_enc").CameraEnc
    starts = {"alt_start": 2, "qknorm_start": 2, "rope_start": 2}
    with shrunk(
        "depth_anything_3.model.dinov2.vision_transformer",
        DinoVisionTransformer={**_TINY, "depth": 6},
    ):
        backbone = importlib.import_module("depth_anything_3.model.dinov2.dinov2").DinoV2(
            "vits", out_layers=[2, 3, 4, 5], **starts
        )
    built: nn.Module = model.DepthAnything3Net(
        backbone,
        head(dim_in=2 * WIDTH, output_dim=2, features=16, out_channels=[16] * 4),
        decoder(dim_in=2 * WIDTH),
        encoder(dim_out=WIDTH, trunk_depth=1, num_heads=HEADS),
    )
    return built


def build_balanced(folder: Path) -> nn.Module:
    """The reference view that is chosen for the first pictures stays it when they are dyed."""
    home = importlib.import_module("depth_anything_3.model.dinov2.vision_transformer")
    choose, chosen = home.select_reference_view, []

    def keep_choice(x: Tensor, **options: Any) -> Tensor:
        if not chosen:
            chosen.append(choose(x, **options))
        return chosen[0]

    home.select_reference_view = keep_choice  # type: ignore[attr-defined]
    return build_depth_anything(folder)


def run_middle_first(model: nn.Module, images: Tensor) -> object:
    return model(images[None], ref_view_strategy="middle")


def run_with_cameras(model: nn.Module, images: Tensor) -> object:
    count, size = len(images), images.shape[-1]
    cameras = torch.eye(4).repeat(1, count, 1, 1)
    cameras[0, :, 0, 3] = torch.arange(count) / 4
    lens = torch.tensor([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1.0]])
    return model(images[None], extrinsics=cameras, intrinsics=lens.repeat(1, count, 1, 1))


# -- MapAnything -----------------------------------------------------------------------------------


def _infinite(**given: Any) -> dict[str, Any]:
    """Ranges of an output that are not limited."""
    names = ("ray_directions", "depth", "confidence", "cam_trans", "quaternions")
    return {k.replace("*", n): v for n in names for k, v in given.items()}


def build_map_anything(folder: Path) -> nn.Module:
    stub("hydra", "cv2")
    vits = "dinov2.models.vision_transformer"
    small = importlib.import_module(vits).vit_small
    encoders = importlib.import_module("uniception.models.encoders.dinov2")
    model = importlib.import_module("mapanything.models.mapanything.model")
    fresh = {"patch_size": 14, "img_size": 518, "init_values": 1.0, "block_chunks": 0}
    hub, limit = torch.hub.load, float("inf")
    torch.hub.load = lambda *args, **kwargs: small(**fresh)
    try:
        with shrunk(vits, DinoVisionTransformer={"depth": 2}):
            return _map_anything(model, encoders, limit)
    finally:
        torch.hub.load = hub


def _map_anything(model: Any, encoders: Any, limit: float) -> nn.Module:
    dense = {"encoder_str": "dense_rep_encoder", "apply_pe": False}
    whole = {"encoder_str": "global_rep_encoder"}
    name = "raydirs+depth+pose+confidence+mask"
    sharing = {
        "name": "tiny",
        "indices": [1, 2],
        "norm_intermediate": True,
        "size": "tiny",
        "depth": 4,
        "distinguish_ref_and_non_ref_views": True,
        "gradient_checkpointing": False,
        "dim": WIDTH,
        "num_heads": HEADS,
        "mlp_ratio": 2,
        "qkv_bias": True,
        "qk_norm": False,
        "init_values": 1.0,
    }
    head = {
        "type": "dpt+pose",
        "feature_head": {"feature_dim": 16, "hooks": [0, 1, 2, 3], "checkpoint_gradient": False},
        "regressor_head": {"output_dim": 6, "checkpoint_gradient": False},
        "pose_head": {"num_resconv_block": 1, "rot_representation_dim": 4},
        "scale_head": {"output_dim": 1},
        "adaptor_type": name,
        "dpt_adaptor": {
            "name": name,
            "ray_directions_mode": "linear",
            "ray_directions_normalize_to_unit_sphere": True,
            "ray_directions_normalize_to_unit_image_plane": False,
            "ray_directions_vmin": -limit,
            "ray_directions_vmax": limit,
            "ray_directions_clamp_min_of_z_dir": False,
            "ray_directions_z_dir_min": -limit,
            "depth_mode": "exp",
            "depth_vmin": 0,
            "depth_vmax": limit,
            "confidence_type": "exp",
            "confidence_vmin": 1,
            "confidence_vmax": limit,
        },
        "pose_adaptor": {
            "name": name,
            "cam_trans_mode": "linear",
            "cam_trans_vmin": -limit,
            "cam_trans_vmax": limit,
            "quaternions_mode": "linear",
            "quaternions_normalize": True,
            "quaternions_vmin": -limit,
            "quaternions_vmax": limit,
        },
        "scale_adaptor": {"name": name, "mode": "exp", "vmin": 1e-8, "vmax": limit},
    }
    inputs = {
        "ray_dirs_encoder_config": {"name": "rays", "in_chans": 3, **dense},
        "depth_encoder_config": {"name": "depth", "in_chans": 1, **dense},
        "cam_rot_encoder_config": {"name": "rotation", "in_chans": 4, **whole},
        "cam_trans_encoder_config": {"name": "translation", "in_chans": 3, **whole},
        "scale_encoder_config": {"name": "scale", "in_chans": 1, **whole},
        **dict.fromkeys(("overall_prob", "ray_dirs_prob", "depth_prob", "cam_prob"), 0),
        "dropout_prob": 1,
        **dict.fromkeys(("sparse_depth_prob", "sparsification_removal_percent"), 0),
        **dict.fromkeys(("depth_scale_norm_all_prob", "pose_scale_norm_all_prob"), 0),
    }
    built: nn.Module = model.MapAnything(
        "tiny",
        encoder_config={
            "encoder_str": "dinov2",
            "name": "tiny",
            "data_norm_type": "dinov2",
            "size": "small",
            "with_registers": False,
            "uses_torch_hub": True,
            "gradient_checkpointing": False,
            "norm_returned_features": False,
        },
        info_sharing_config={
            "model_type": "alternating_attention",
            "model_return_type": "intermediate_features",
            "custom_positional_encoding": None,
            "module_args": sharing,
        },
        pred_head_config=head,
        geometric_input_config=inputs,
        use_register_tokens_from_encoder=True,
    )
    return built


def run_map_anything(model: nn.Module, images: Tensor) -> object:
    views = [{"img": image[None], "data_norm_type": ["dinov2"]} for image in images]
    return model(views)


# -- CroCo, DUSt3R, MASt3R -------------------------------------------------------------------------

_BRANCHES = ("proj", "fc2")
_CROCO = {
    "enc_embed_dim": WIDTH,
    "enc_depth": 2,
    "enc_num_heads": HEADS,
    "dec_embed_dim": 32,
    "dec_depth": 2,
    "dec_num_heads": 2,
    "img_size": (48, 64),
}


def build_croco(folder: Path) -> nn.Module:
    net = importlib.import_module("models.croco").CroCoNet
    square = {"img_size": (64, 64)}
    return quiet(net(**{**_CROCO, **square}, pos_embed="RoPE100", mask_ratio=0.5), *_BRANCHES)


def run_croco(model: nn.Module, images: Tensor) -> object:
    # Which patches are hidden is drawn anew in each pass; with this seed those dyed are not.
    torch.manual_seed(8)
    return model(images[:1], images[1:])


_HEAD = {
    "pos_embed": "RoPE100",
    "head_type": "linear",
    "output_mode": "pts3d",
    "depth_mode": ("exp", -math.inf, math.inf),
    "conf_mode": ("exp", 1, math.inf),
}


def build_dust3r(folder: Path) -> nn.Module:
    net = importlib.import_module("dust3r.model").AsymmetricCroCo3DStereo
    return quiet(net(**_CROCO, **_HEAD), *_BRANCHES)


def build_mast3r(folder: Path) -> nn.Module:
    net = importlib.import_module("mast3r.model").AsymmetricMASt3R
    # Its head takes no fewer than 10 blocks.
    given = {"head_type": "catmlp+dpt", "output_mode": "pts3d+desc24", "dec_depth": 10}
    confidence = {"desc_conf_mode": ("exp", 0, math.inf), "two_confs": True}
    return quiet(net(**{**_CROCO, **_HEAD, **given}, **confidence), *_BRANCHES)


def run_pair(model: nn.Module, images: Tensor) -> object:
    shape = torch.tensor([images.shape[-2:]])
    views = [
        {"img": image[None], "true_shape": shape, "instance": [str(at)]}
        for at, image in enumerate(images)
    ]
    return model(*views)


# -- CUT3R -----------------------------------------------------------------------------------------


def build_cut3r(folder: Path) -> nn.Module:
    importlib.import_module("transformers")  # asks for accelerate's version where there is one
    stub("accelerate", "accelerate.logging", get_logger=lambda name, **_: logging.getLogger(name))
    module = importlib.import_module("dust3r.model")
    rope = importlib.import_module("models.pos_embed").RoPE2D
    if not hasattr(rope, "plain"):
        # The pose token lies at −1, where the table of angles has no entry. Angles are relative.
        rope.plain = rope.forward
        rope.forward = lambda self, tokens, places: rope.plain(self, tokens, places + 1)
    config = module.ARCroco3DStereoConfig(
        **{**_CROCO, **_HEAD},
        pose_mode=("exp", -math.inf, math.inf),
        state_size=16,
        local_mem_size=8,
        state_dec_num_heads=2,
        pose_head=True,
        rgb_head=True,
        landscape_only=False,
    )
    config.output_mode = "pts3d+pose"
    return quiet(module.ARCroco3DStereo(config), *_BRANCHES)


def run_cut3r(model: nn.Module, images: Tensor) -> object:
    yes, no = torch.tensor([True]), torch.tensor([False])
    shape = torch.tensor([images.shape[-2:]])
    views = [
        {
            "img": image[None],
            "ray_map": torch.zeros(1, *images.shape[-2:], 6),
            "true_shape": shape,
            "img_mask": yes,
            "ray_mask": no,
            "update": yes,
            "reset": no,
        }
        for image in images
    ]
    return model(views)


# -- matchers --------------------------------------------------------------------------------------


def build_lightglue(folder: Path) -> nn.Module:
    net = importlib.import_module("lightglue").LightGlue
    built: nn.Module = net(
        features=None,
        input_dim=WIDTH,
        descriptor_dim=WIDTH,
        n_layers=3,
        num_heads=HEADS,
        depth_confidence=-1,
        width_confidence=-1,
    )
    return built


def run_lightglue(model: nn.Module, images: Tensor) -> object:
    """Each patch of the two pictures is a keypoint; its descriptor is what the patch holds."""
    sides = {}
    for at, image in enumerate(images):
        rows, cols = image.shape[-2] // 8, image.shape[-1] // 8
        patches = image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4)
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).flip(-1)
        sides[f"image{at}"] = {
            "keypoints": places[None] * 8.0 + 4,
            "descriptors": patches.reshape(1, rows * cols, -1)[..., :WIDTH],
            "image_size": torch.tensor([[image.shape[-1], image.shape[-2]]]),
        }
    return model(sides)


def build_loftr(folder: Path) -> nn.Module:
    module = importlib.import_module("src.loftr")
    config = copy.deepcopy(module.default_cfg)
    config["resnetfpn"] = {"initial_dim": 16, "block_dims": [16, 24, 32]}
    config["coarse"].update(d_model=32, d_ffn=32, nhead=4, attention="full")
    config["coarse"]["layer_names"] = ["self", "cross"]
    config["fine"].update(d_model=16, d_ffn=16, nhead=4, attention="full")
    config["match_coarse"].update(thr=0.0, border_rm=0)
    model = module.LoFTR(config)
    matching = model.coarse_matching
    # Untrained features match anywhere; each cell matches the one in its place, so that the fine
    # layers always run on the same.
    match = matching.get_coarse_match
    matching.get_coarse_match = lambda conf, data: match(torch.eye(conf.shape[1])[None], data)
    return quiet(model, "merge", "mlp")


_MATCHING = {
    "coarse_matching": "the product of a softmax over rows and one over columns: no values",
    "fine_matching": "where in a window a match lies",
}


def run_loftr(model: nn.Module, images: Tensor) -> object:
    grey = images.mean(1, keepdim=True)
    data = {"image0": grey[:1], "image1": grey[1:]}
    model(data)
    return {name: value for name, value in data.items() if isinstance(value, Tensor)}


# -- DINO ------------------------------------------------------------------------------------------


def build_dinov2(folder: Path) -> nn.Module:
    vit = importlib.import_module("dinov2.models.vision_transformer").DinoVisionTransformer
    built: nn.Module = vit(
        **_TINY, depth=3, patch_size=14, img_size=56, num_register_tokens=4, block_chunks=0
    )
    return built


def build_dinov3(folder: Path) -> nn.Module:
    vit = importlib.import_module("dinov3.models.vision_transformer").DinoVisionTransformer
    built: Any = vit(**_TINY, depth=3, n_storage_tokens=4, layerscale_init=1.0, mask_k_bias=True)
    built.init_weights()
    return built


# -- diffusers -------------------------------------------------------------------------------------

_TEXT = 3


def build_flux(folder: Path) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    built: nn.Module = FluxTransformer2DModel(
        in_channels=12,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    return built


def _text(width: int) -> Tensor:
    return torch.linspace(-1, 1, _TEXT * width).sin().reshape(1, _TEXT, width) * 2


def run_flux(model: nn.Module, images: Tensor) -> object:
    """Latents, packed 2×2 to a token as its pipeline does."""
    count, _, height, width = images.shape
    packed = images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5)
    places = torch.zeros(height // 2, width // 2, 3)
    places[..., 1] += torch.arange(height // 2)[:, None]
    places[..., 2] += torch.arange(width // 2)
    return model(
        hidden_states=packed.reshape(count, -1, 12),
        encoder_hidden_states=_text(32),
        pooled_projections=torch.ones(1, 32),
        timestep=torch.tensor([0.5]),
        img_ids=places.flatten(0, 1),
        txt_ids=torch.zeros(_TEXT, 3),
        return_dict=False,
    )


def build_sd3(folder: Path) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    built: nn.Module = SD3Transformer2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return built


def run_sd3(model: nn.Module, images: Tensor) -> object:
    return model(
        hidden_states=images,
        encoder_hidden_states=_text(32),
        pooled_projections=torch.ones(1, 32),
        timestep=torch.tensor([500.0]),
        return_dict=False,
    )


def build_unet(folder: Path) -> nn.Module:
    from diffusers import UNet2DConditionModel

    built = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
        attention_head_dim=4,
    )
    # A convolution looks beyond its token; its middle must outweigh the rest.
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim == 4 and parameter.shape[-1] == 3:
                parameter *= 0.02 + torch.eye(3)[1].outer(torch.eye(3)[1]) * 2
    return quiet(built, "ff")


def run_unet(model: nn.Module, images: Tensor) -> object:
    return model(images, torch.tensor([500]), encoder_hidden_states=_text(32), return_dict=False)


# -- Qwen ------------------------------------------------------------------------------------------


def build_qwen2(folder: Path) -> nn.Module:
    home = importlib.import_module("transformers.models.qwen2_vl.modeling_qwen2_vl")
    config = home.Qwen2VLConfig().vision_config
    config.update({"depth": 2, "embed_dim": WIDTH, "num_heads": HEADS, "hidden_size": WIDTH})
    built: nn.Module = home.Qwen2VisionTransformerPretrainedModel._from_config(config)
    return built


def build_qwen25(folder: Path) -> nn.Module:
    home = importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    config = home.Qwen2_5_VLConfig().vision_config
    config.update({"depth": 2, "hidden_size": WIDTH, "num_heads": HEADS, "out_hidden_size": WIDTH})
    config.update({"intermediate_size": WIDTH, "window_size": 56, "fullatt_block_indexes": [1]})
    built: nn.Module = home.Qwen2_5_VisionTransformerPretrainedModel._from_config(config)
    return built


def run_qwen(model: nn.Module, images: Tensor) -> object:
    """Flat patches of all pictures, groups of 2×2 together, each picture shown twice in time."""
    count, _, height, width = images.shape
    rows, cols = height // 14, width // 14
    cells = images.reshape(count, 3, rows // 2, 2, 14, cols // 2, 2, 14)
    cells = cells.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
    flat = cells.expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(count * rows * cols, -1)
    return model(flat, grid_thw=torch.tensor([[1, rows, cols]] * count))


MODELS = [
    Model(
        "Pi3",
        "Pi3",
        build_pi3,
        pictures(3, 3, 4),
        run=run_batch,
        note="The decoder has its smallest width (384) and 4 blocks.",
    ),
    Model(
        "Depth Anything 3",
        "Depth-Anything-3",
        build_depth_anything,
        pictures(4, 3, 4),
        run=run_middle_first,
        paths=("src",),
        note='Run with `ref_view_strategy="middle"`: picture 2 of 4 comes first.',
    ),
    Model(
        "Depth Anything 3, saddle",
        "Depth-Anything-3",
        build_balanced,
        pictures(4, 3, 4),
        run=run_batch,
        paths=("src",),
        note="The reference view is that of the model's choice, kept while patches are dyed.",
    ),
    Model(
        "Depth Anything 3, cameras given",
        "Depth-Anything-3",
        build_depth_anything,
        pictures(3, 3, 4),
        run=run_with_cameras,
        paths=("src",),
    ),
    Model(
        "MapAnything",
        "map-anything",
        build_map_anything,
        pictures(3, 4, 5),
        run=run_map_anything,
        paths=(".", "../UniCeption", "../dinov2"),
        note=(
            "UniCeption and DINOv2 from their checkouts (no download); hydra and cv2, which are "
            "not run, are empty modules."
        ),
    ),
    Model(
        "CroCo",
        "croco",
        build_croco,
        pictures(2, 4, 4, 16),
        patch=16,
        run=run_croco,
        draw=draw_captured,
        steps=True,
    ),
    Model(
        "DUSt3R",
        "dust3r",
        build_dust3r,
        pictures(2, 3, 4, 16),
        patch=16,
        run=run_pair,
        draw=draw_captured,
    ),
    Model(
        "MASt3R",
        "mast3r",
        build_mast3r,
        pictures(2, 3, 4, 16),
        patch=16,
        run=run_pair,
        draw=draw_captured,
    ),
    Model(
        "CUT3R",
        "CUT3R",
        build_cut3r,
        pictures(3, 3, 4, 16),
        patch=16,
        run=run_cut3r,
        draw=draw_captured,
        steps=True,
        paths=("src",),
        note="Positions shifted by one: without CUDA its RoPE has no −1, the pose token's place.",
    ),
    Model(
        "LightGlue",
        "LightGlue",
        build_lightglue,
        pictures(2, 3, 4, 8),
        patch=8,
        run=run_lightglue,
        refused="keypoints, no grid",
        paths=("lightglue",),
        note="Keypoints are the centres of patches; pruning and early stopping are off.",
    ),
    Model(
        "LoFTR, full attention",
        "LoFTR",
        build_loftr,
        pictures(2, 4, 6, 8),
        patch=8,
        run=run_loftr,
        raises="ran 2 times",
        refused="no known layout",
        not_attention=_MATCHING,
        note=(
            'With `attention="full"`: the default is linear attention, which has no matrix. '
            "Matches are those of equal places."
        ),
    ),
    Model("DINOv2", "dinov2", build_dinov2, pictures(2, 3, 4), draw=draw_captured),
    Model("DINOv3", "dinov3", build_dinov3, pictures(2, 3, 4, 16), patch=16, draw=draw_captured),
    Model(
        "Flux",
        "",
        build_flux,
        pictures(1, 3, 4, 2),
        patch=2,
        run=run_flux,
        package="diffusers",
        draw=draw_captured,
    ),
    Model(
        "SD3",
        "",
        build_sd3,
        pictures(1, 3, 4, 2),
        patch=2,
        run=run_sd3,
        package="diffusers",
        draw=draw_captured,
    ),
    Model(
        "UNet",
        "",
        build_unet,
        pictures(1, 5, 9, 1),
        patch=1,
        run=run_unet,
        package="diffusers",
        draw=draw_captured,
    ),
    Model(
        "Qwen2-VL",
        "",
        build_qwen2,
        pictures(2, 4, 6),
        run=run_qwen,
        package="transformers",
        draw=draw_captured,
    ),
    Model(
        "Qwen2.5-VL",
        "",
        build_qwen25,
        pictures(2, 4, 6),
        run=run_qwen,
        package="transformers",
        draw=draw_captured,
    ),
]
