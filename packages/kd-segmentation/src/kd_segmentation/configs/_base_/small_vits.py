# ruff: noqa: C408
# Two small segmentors on timm's vision transformer, patches of 8 pixels; a config adds its data_preprocessor and, where
# it has them, other classes and another size.


def network(dim, depth, heads, channels):
    return dict(
        type="EncoderDecoder",
        backbone=dict(
            type="TIMMBackbone",
            model_name="vit_tiny_patch16_224",
            pretrained=False,
            img_size=64,
            patch_size=8,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            out_indices=(depth // 2 - 1, depth - 1),
        ),
        decode_head=dict(
            type="SegformerHead",
            in_channels=[dim, dim],
            in_index=[0, 1],
            channels=channels,
            dropout_ratio=0.1,
            num_classes=6,
            norm_cfg=dict(type="BN", requires_grad=True),
            align_corners=False,
            loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, avg_non_ignore=True, loss_weight=1.0),
        ),
        train_cfg=dict(),
        test_cfg=dict(mode="whole"),
    )


small_vit = network(48, 4, 3, 48)
large_vit = network(96, 4, 4, 64)
