"""Your own videos with Re2 Video Swin-T and ActionFormer; docs/your_data.md goes through it step by step.

    .venv/bin/python -m re2tal_jax.data.check --config configs/custom.py
    .venv/bin/python -m re2tal_jax.main --config configs/custom.py

For videos of any length with actions of about a second to a minute. Windows of 384 snippets, two frames each, every
fourth frame of the video, at 224 x 224: 102 s at 30 fps. Put the videos into data/custom/videos, the annotation beside
them, and a converted Video Swin-T (docs/conversion.md) into data/custom/swin_tiny: without one, frozen norms and a low
rate leave the backbone random. Set num_classes to what data.check counts. A step plans 9.8 GB, compiled for an H100:
one GPU of 24 GB should hold it (--mode inspect tells the memory of your values). Rates and epochs are a start, between
the two published recipes and measured on no data set: with few videos raise the epochs rather than the rates.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the complete configuration."""
    loader = dict(workers=4, threads=2, ahead=2, cache_mib=0, on_error="error")
    return ConfigDict(
        dict(
            seed=0,
            compute_dtype="bfloat16",
            num_snippets=384,
            frames_per_snippet=2,
            num_classes=1,
            data=dict(
                name="custom",
                annotations="data/custom/annotations.csv",
                videos="data/custom/videos",
                classes=None,  # the labels of the annotation, sorted
                tiers=None,
                validation_share=0.2,  # where the annotation has no subsets
                missing_videos="error",
            ),
            train=dict(
                subset="training",
                batch_size=4,
                policy=dict(name="random_trunc", snippet_stride=8, min_overlap=0.75, crop_ratio=(0.9, 1.0)),
                loader=dict(loader, height=256, width=340, crop="squeeze"),
                augment=dict(
                    height=224,
                    width=224,
                    crop=0.92,
                    aspect=4 / 3,
                    flip=0.5,  # 0 where left and right are different classes
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
                subset="validation",
                batch_size=4,
                policy=dict(name="sliding_window", snippet_stride=8, overlap=0.5),
                loader=dict(loader, height=224, width=224, crop="center"),
                augment=dict(height=224, width=224, dtype="uint8"),
                mirror=None,
            ),
            backbone=dict(name="video_swin_tiny", rewired=True, checkpoint="data/custom/swin_tiny", drop_path_rate=0.2),
            localizer=dict(
                name="actionformer",
                channels=256,
                arch=(2, 2, 5),
                num_heads=4,
                window=-1,
                use_abs_pos=False,
                max_seq_len=384,
                path_drop_rate=0.1,
                regression_range=((0, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 10000)),
                loss_normalizer=100.0,
            ),
            detector=dict(
                pixel_mean=(123.675, 116.28, 103.53), pixel_std=(58.395, 57.12, 57.375), snippet_loss_weight=0.0
            ),
            parameter_groups=dict(localizer_lr=1e-4, backbone_lr=5e-5, weight_decay=0.05, freeze_backbone_norms=True),
            optimizer=dict(
                schedule=dict(decay="cosine", length=dict(epochs=60), warmup=dict(epochs=5), min_lr=1e-8),
                clip_norm=1.0,
                ema_decay=0.99,  # few videos are few steps, of which an average over 1,000 would be mostly the start
                accumulate=1,
            ),
            mesh=dict(data=-1, fsdp=1),
            distributed=None,
            loop=dict(
                stop=dict(epochs=60),
                evaluate_every=dict(epochs=5),
                checkpoint_every=dict(steps=200),
                log_every_steps=10,
            ),
            checkpoints=dict(keep_latest=1, keep_best=1, best_metric="average_mAP"),
            postprocess=dict(
                nms=dict(method="gaussian", sigma=0.5, min_score=0.001, max_seg_num=200, multiclass=True),
                suppress_in="video",
            ),
            external_classifier=None,
            evaluation=dict(tiou_thresholds=(0.3, 0.4, 0.5, 0.6, 0.7), blocked=None),
        )
    )
