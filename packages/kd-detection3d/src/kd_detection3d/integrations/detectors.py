"""Bird's-eye-view detectors of cameras, LiDAR or both, in mmdet3d's registry, of parts that run on any device.

This file needs torch and mmdet3d alone. A saved camera student has a copy of it beside its config, so that it opens
where this package is not installed: put the student's folder on the Python path.

    model = dict(type="BEVDetector", data_preprocessor=..., img_backbone=..., img_neck=...,
                 view_transform=dict(type="LiftSplat", ...), pts_backbone=..., pts_neck=..., pts_bbox_head=...)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmcv.cnn import ConvModule
from mmdet3d.models.detectors import MVXTwoStageDetector
from mmdet3d.models.layers.fusion_layers import apply_3d_transformation
from mmdet3d.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn


@MODELS.register_module()
class LiftSplat(BaseModule):
    """Image features into a bird's-eye view: a distribution over depths for every pixel, then the sum in each cell
    (Lift, Splat, Shoot; arXiv 2008.05711).

    in_channels: of the image features. out_channels: of the map. point_cloud_range: x0 y0 z0 x1 y1 z1, metres.
    bev_shape: rows (y) and columns (x) of the map. depth: start, stop and step of the depths, metres.
    mid_channels: of a 3x3 convolution before the depths and features are predicted; None: there is none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        point_cloud_range: Sequence[float],
        bev_shape: Sequence[int],
        depth: Sequence[float] = (2.0, 58.0, 0.5),
        mid_channels: int | None = None,
        init_cfg: Mapping[str, Any] | None = None,
    ):
        super().__init__(init_cfg)
        self.limits, self.shape, self.channels = tuple(point_cloud_range), tuple(bev_shape), out_channels
        self.register_buffer("depths", torch.arange(*depth), persistent=False)
        last = nn.Conv2d(mid_channels or in_channels, len(self.depths) + out_channels, 1)
        norm = {"type": "BN"}
        self.depth_net = (
            nn.Sequential(ConvModule(in_channels, mid_channels, 3, padding=1, norm_cfg=norm), last)
            if mid_channels
            else last
        )

    def forward(
        self, features: Tensor, lidar2img: Tensor, image_size: Sequence[int], metas: Sequence[Mapping[str, Any]]
    ) -> Tensor:
        """features (B, V, C, h, w), lidar2img (B, V, 4, 4) into pixels of images of H, W -> (B, out, rows, columns).

        metas: for each frame; augmentations of its points that they name move the pixels' places too.
        """
        batch, rows, columns = len(features), *features.shape[-2:]
        found = self.depth_net(features.flatten(0, 1))
        depth = found[:, : len(self.depths)].softmax(1).permute(0, 2, 3, 1).flatten()  # (B V h w D)
        context = found[:, len(self.depths) :].permute(0, 2, 3, 1).flatten(0, 2)  # (B V h w, C)
        places = self.frustum((rows, columns), lidar2img, image_size)
        moved = [
            apply_3d_transformation(place.flatten(0, -2), "LIDAR", meta) if "transformation_3d_flow" in meta else place
            for place, meta in zip(places, metas)
        ]
        xyz = torch.stack([place.reshape(-1, 3) for place in moved])  # (B, V h w D, 3)
        cell, inside = self._cells(xyz)
        cell = (cell + torch.arange(batch, device=cell.device)[:, None] * self.shape[0] * self.shape[1]).flatten()
        kept = inside.flatten().nonzero().squeeze(1)
        values = depth[kept, None] * context[kept // len(self.depths)]
        flat = values.new_zeros(batch * self.shape[0] * self.shape[1], self.channels).index_add(0, cell[kept], values)
        return flat.view(batch, *self.shape, self.channels).permute(0, 3, 1, 2).contiguous()

    def frustum(self, shape: Sequence[int], lidar2img: Tensor, image_size: Sequence[int]) -> Tensor:
        """Where the pixels of (h, w) feature maps lie at every depth: (B, V, h, w, D, 3) in the LiDAR's frame."""
        steps = [size / count for size, count in zip(image_size, shape)]
        v, u = ((torch.arange(count, device=lidar2img.device) + 0.5) * step - 0.5 for count, step in zip(shape, steps))
        v, u, d = torch.meshgrid(v, u, self.depths.to(lidar2img.device), indexing="ij")
        pixels = torch.stack([u * d, v * d, d, torch.ones_like(d)], dim=-1)  # (h, w, D, 4)
        back = torch.linalg.inv(lidar2img.double()).to(lidar2img)[:, :, None, None, None]  # (B, V, 1, 1, 1, 4, 4)
        return (back @ pixels[..., None])[..., :3, 0]

    def _cells(self, xyz: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the cell of each place, row by row, and whether it is inside."""
        low, high = xyz.new_tensor(self.limits[:3]), xyz.new_tensor(self.limits[3:])
        count = xyz.new_tensor([self.shape[1], self.shape[0], 1])
        index = ((xyz - low) / (high - low) * count).floor()
        inside = ((index >= 0) & (index < count)).all(-1)
        index = index.masked_fill(~inside[..., None], 0).long()
        return index[..., 1] * self.shape[1] + index[..., 0], inside


@MODELS.register_module()
class ChannelAttentionFusion(BaseModule):
    """Maps of several sensors into one: concatenated, weighted by channel, then a 3x3 convolution.

    in_channels: of each map. out_channels: of the result. The weights are sigmoids of a 1x1 convolution of the mean.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        norm_cfg: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
    ):
        super().__init__(init_cfg)
        total = sum(in_channels)
        self.weigh = nn.Conv2d(total, total, 1)
        norm = dict(norm_cfg or {"type": "BN", "eps": 1e-3, "momentum": 0.01})
        self.join = ConvModule(total, out_channels, 3, padding=1, norm_cfg=norm)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, H, W) of one resolution -> (B, out, H, W)."""
        if len({item.shape[-2:] for item in maps}) > 1:
            raise ValueError(f"fusion: maps of the same size are joined, got {[tuple(m.shape[-2:]) for m in maps]}")
        joined = torch.cat(list(maps), dim=1)
        return self.join(joined * self.weigh(joined.mean((2, 3), keepdim=True)).sigmoid())


@MODELS.register_module()
class BEVDetector(MVXTwoStageDetector):
    """A detector in the bird's-eye view: cameras through `view_transform`, LiDAR through `pts_middle_encoder`.

    With both, `fusion` joins their maps. `pts_backbone`, `pts_neck` and `pts_bbox_head` follow, as in CenterPoint. The
    images' cameras are `lidar2img` of a frame's meta, one (4, 4) a view, into pixels of the network's input.
    """

    def __init__(
        self,
        *,
        view_transform: Mapping[str, Any] | None = None,
        fusion: Mapping[str, Any] | None = None,
        **arguments: Any,
    ):
        super().__init__(**arguments)
        sensors = [view_transform is not None, arguments.get("pts_middle_encoder") is not None]
        if not any(sensors) or all(sensors) != (fusion is not None):
            raise ValueError("give view_transform, pts_middle_encoder, or both with fusion")
        self.view_transform = MODELS.build(view_transform) if view_transform else None
        self.fusion = MODELS.build(fusion) if fusion else None

    def extract_feat(
        self, batch_inputs_dict: Mapping[str, Any], batch_input_metas: Sequence[Mapping[str, Any]]
    ) -> tuple[None, Sequence[Tensor]]:
        maps = []
        if self.view_transform is not None:
            maps.append(self._from_images(batch_inputs_dict["imgs"], batch_input_metas))
        if getattr(self, "pts_middle_encoder", None) is not None:
            maps.append(self._from_points(batch_inputs_dict["voxels"], len(batch_input_metas)))
        joined = self.fusion(maps) if self.fusion is not None else maps[0]
        features = self.pts_backbone(joined)
        return None, self.pts_neck(features) if self.with_pts_neck else features

    def _from_images(self, images: Tensor, metas: Sequence[Mapping[str, Any]]) -> Tensor:
        batch, views = images.shape[:2]
        features = self.img_backbone(images.flatten(0, 1))
        if self.with_img_neck:
            features = self.img_neck(features)
        features = features[0] if isinstance(features, list | tuple) else features
        cameras = torch.stack([torch.as_tensor(np.asarray(meta["lidar2img"])).to(images) for meta in metas])
        size = images.shape[-2:]
        return self.view_transform(features.unflatten(0, (batch, views)), cameras, size, metas)

    def _from_points(self, voxels: Mapping[str, Tensor], batch: int) -> Tensor:
        features = self.pts_voxel_encoder(voxels["voxels"], voxels["num_points"], voxels["coors"])
        return self.pts_middle_encoder(features, voxels["coors"], batch)

    def _forward(self, batch_inputs_dict: Mapping[str, Any], batch_data_samples: Sequence[Any]) -> Any:
        _, features = self.extract_feat(batch_inputs_dict, [sample.metainfo for sample in batch_data_samples])
        return self.pts_bbox_head(features)
