r"""THUMOS-14 with a rewired VideoMAE ViT-B and ActionFormer: Re2TAL's wiring on the backbone of AdaTAD's recipes.

    .venv/bin/python -m re2tal_jax.main --config configs/thumos_videomae_b.py \
        --config.data.annotations=… --config.data.videos=…

Windows of 768 frames, every fourth of the video, at 160 x 160, attended to in clips of 16; 20 classes; 60 epochs of a
100-epoch cosine, batch 2. docs/data.md says where each file goes. Sizes and rates are those of OpenTAD's recipe that
trains the whole ordinary network (configs/adatad/thumos/e2e_thumos_videomae_b_768x1_160_fullft.py; AdaTAD, arXiv
2311.17241). Training a rewired network so is ours: no published figure exists, and mAP, hours and hardware of this
implementation are not measured. Name pretrained weights as --config.backbone.checkpoint: at a rate of 1e-5 random ones
stay random. Re2TAL fine-tuned its rewired backbones on Kinetics-400 first. Memory per device: --mode inspect.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the complete configuration."""
    loader = dict(workers=8, threads=2, ahead=2, cache_mib=0, on_error="error")
    return ConfigDict(
        dict(
            seed=42,
            compute_dtype="bfloat16",
            num_snippets=768,
            frames_per_snippet=1,
            num_classes=20,
            data=dict(
                name="thumos14",
                annotations="data/thumos/thumos14.json",
                videos="data/thumos/videos",
                missing_videos="error",
            ),
            train=dict(
                subset="Validation",  # THUMOS trains on its validation videos; the name is that of the annotation file
                batch_size=2,
                policy=dict(name="random_trunc", snippet_stride=4, min_overlap=0.75, crop_ratio=(0.9, 1.0)),
                loader=dict(loader, height=182, width=242, crop="squeeze"),  # short side as published, 16:9 narrowed
                augment=dict(
                    height=160,
                    width=160,
                    crop=0.92,
                    aspect=4 / 3,
                    flip=0.5,
                    rotation_degrees=30.0,
                    rotation_probability=2 / 15,
                    brightness=0.5,
                    contrast=0.5,
                    saturation=0.5,
                    hue=0.14,
                    dtype="uint8",
                ),
                mirror=None,
            ),
            eval=dict(
                subset="Test",
                batch_size=2,
                policy=dict(name="sliding_window", snippet_stride=4, overlap=0.5),
                loader=dict(loader, height=160, width=160, crop="center"),
                augment=dict(height=160, width=160, dtype="uint8"),
                mirror=None,
            ),
            backbone=dict(name="vit_base", rewired=True, checkpoint=None, drop_path_rate=0.1),
            localizer=dict(
                name="actionformer",
                channels=512,
                arch=(2, 2, 5),
                num_heads=4,
                window=-1,
                use_abs_pos=False,
                max_seq_len=768,
                path_drop_rate=0.1,
                regression_range=((0, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 10000)),
                label_smoothing=0.0,
                reg_loss_weight=1.0,
                loss_normalizer=100.0,
            ),
            detector=dict(
                pixel_mean=(123.675, 116.28, 103.53), pixel_std=(58.395, 57.12, 57.375), snippet_loss_weight=0.0
            ),
            parameter_groups=dict(localizer_lr=1e-4, backbone_lr=1e-5, weight_decay=0.05, freeze_backbone_norms=False),
            optimizer=dict(
                schedule=dict(decay="cosine", length=dict(epochs=100), warmup=dict(epochs=5), min_lr=1e-8),
                b1=0.9,
                b2=0.999,
                clip_norm=1.0,
                ema_decay=0.999,
                accumulate=1,
            ),
            mesh=dict(data=-1, fsdp=1),
            distributed=None,
            loop=dict(
                stop=dict(epochs=60),
                evaluate_every=dict(epochs=5),
                checkpoint_every=dict(steps=500),
                log_every_steps=20,
            ),
            checkpoints=dict(keep_latest=1, keep_best=1, best_metric="average_mAP"),
            postprocess=dict(
                nms=dict(method="gaussian", sigma=0.7, min_score=0.001, max_seg_num=2000, multiclass=True),
                suppress_in="video",
            ),
            external_classifier=None,
            evaluation=dict(tiou_thresholds=(0.3, 0.4, 0.5, 0.6, 0.7), blocked=None),
        )
    )
