"""Rendered videos, end to end from random weights: the whole pipeline in minutes on a laptop, without any download.

    make demo
    .venv/bin/python -m re2tal_jax.main --config configs/demo.py

240 training videos (H.264, several sizes and frame rates) with six classes of motion that no single frame reveals.
"""

from ml_collections import ConfigDict

from re2tal_jax.data import scenes


def get_config() -> ConfigDict:
    """Return the complete configuration."""
    size = 32
    loader = dict(height=size, width=size, crop="squeeze", workers=0, threads=2, cache_mib=512, on_error="error")
    augment = dict(height=size, width=size, crop=0.0, flip=0.0, dtype="float32")
    return ConfigDict(
        dict(
            seed=0,
            compute_dtype="float32",
            num_snippets=48,
            frames_per_snippet=2,
            num_classes=6,
            data=dict(name="synthetic", root="runs/demo/data", num_train=240, num_validation=40, seed=0),
            train=dict(
                subset="training",
                batch_size=4,
                policy=dict(name="resize"),
                loader=dict(loader),
                augment=dict(augment),
                # ours, not ActionFormer's: the classes are motions with a direction, labels follow mirror and time
                mirror=dict(flip=0.5, reverse=0.5, flip_classes=scenes.FLIP, reverse_classes=scenes.REVERSE),
            ),
            eval=dict(
                subset="validation",
                batch_size=4,
                policy=dict(name="resize"),
                loader=dict(loader),
                augment=dict(augment),
                mirror=None,
            ),
            backbone=dict(
                name="video_swin_tiny",
                rewired=True,
                checkpoint=None,
                patch_size=(2, 4, 4),
                embed_dim=32,
                depths=(2, 2),
                num_heads=(2, 4),
                window_size=(4, 4, 4),
                drop_path_rate=0.0,
            ),
            localizer=dict(
                name="actionformer",
                channels=96,
                arch=(2, 1, 3),
                num_heads=4,
                window=-1,
                use_abs_pos=True,
                max_seq_len=48,
                regression_range=((0, 4), (4, 8), (8, 16), (16, 10000)),
                loss_normalizer=40.0,
            ),
            # The auxiliary loss is ours too; without it random weights learn nothing in this time (see Detector).
            detector=dict(pixel_mean=(127.5, 127.5, 127.5), pixel_std=(63.75, 63.75, 63.75), snippet_loss_weight=5.0),
            parameter_groups=dict(
                localizer_lr=1.8e-3, backbone_lr=1.8e-3, weight_decay=0.05, freeze_backbone_norms=False
            ),
            optimizer=dict(
                schedule=dict(decay="cosine", length=dict(steps=2000), warmup=dict(steps=60), min_lr=1e-6),
                b2=0.98,
                clip_norm=1.0,
                ema_decay=0.99,
                accumulate=1,
            ),
            mesh=dict(data=-1, fsdp=1, cpu_devices=2),
            distributed=None,
            loop=dict(
                stop=dict(steps=2000),
                evaluate_every=dict(steps=500),
                checkpoint_every=dict(steps=250),
                log_every_steps=50,
            ),
            checkpoints=dict(keep_latest=1, keep_best=1, best_metric="average_mAP"),
            postprocess=dict(
                nms=dict(method="gaussian", sigma=0.5, min_score=0.001, max_seg_num=100, multiclass=True),
                suppress_in="window",
                pre_nms_threshold=0.001,
                pre_nms_top_k=2000,
            ),
            external_classifier=None,
            evaluation=dict(tiou_thresholds=(0.3, 0.4, 0.5, 0.6, 0.7), blocked=None),
        )
    )
