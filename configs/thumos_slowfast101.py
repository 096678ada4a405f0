r"""THUMOS-14 with Re2 SlowFast-101 and ActionFormer: the recipe of Re2TAL (arXiv 2211.14053) as OpenTAD ran it.

    .venv/bin/python -m re2tal_jax.main --config configs/thumos_slowfast101.py \
        --config.data.annotations=… --config.data.videos=…

Windows of 512 snippets, two frames each, every second frame of the video, at 224 x 224; 20 classes; 120 epochs of a
1,500-epoch cosine. docs/data.md says where each file goes. Published run: batch 2. Published mAP (tIoU .3/.4/.5/.6/.7,
average): 84.16/80.26/74.27/62.66/49.60, 70.19; public annotations differ, name yours beside a number. It started from
a backbone fine-tuned on Kinetics-400 after rewiring: name yours as --config.backbone.checkpoint, without one frozen
norms and a rate of 1e-5 leave it random. Memory per device: --mode inspect. Hours and mAP of this implementation on the
real videos: not measured yet.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the complete configuration."""
    loader = dict(workers=8, threads=2, ahead=2, cache_mib=0, on_error="error")
    return ConfigDict(
        dict(
            seed=42,
            compute_dtype="bfloat16",
            num_snippets=512,
            frames_per_snippet=2,
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
                loader=dict(loader, height=256, width=340, crop="squeeze"),  # short side as published, 16:9 narrowed
                augment=dict(
                    height=224,
                    width=224,
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
                loader=dict(loader, height=224, width=224, crop="center"),
                augment=dict(height=224, width=224, dtype="uint8"),
                mirror=None,
            ),
            backbone=dict(name="slowfast_r101", rewired=True, checkpoint=None),
            localizer=dict(
                name="actionformer",
                channels=512,
                arch=(2, 2, 5),
                num_heads=4,
                window=-1,
                use_abs_pos=False,
                max_seq_len=512,
                path_drop_rate=0.1,
                regression_range=((0, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 10000)),
                label_smoothing=0.0,
                reg_loss_weight=1.0,
                loss_normalizer=100.0,
            ),
            detector=dict(
                pixel_mean=(123.675, 116.28, 103.53), pixel_std=(58.395, 57.12, 57.375), snippet_loss_weight=0.0
            ),
            parameter_groups=dict(localizer_lr=1e-4, backbone_lr=1e-5, weight_decay=0.05, freeze_backbone_norms=True),
            optimizer=dict(
                schedule=dict(decay="cosine", length=dict(epochs=1500), warmup=dict(epochs=5), min_lr=1e-8),
                b1=0.9,
                b2=0.999,
                clip_norm=1.0,
                ema_decay=0.999,
                accumulate=1,
            ),
            mesh=dict(data=-1, fsdp=1),
            distributed=None,
            loop=dict(
                stop=dict(epochs=120),
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
