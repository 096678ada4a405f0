"""THUMOS-14 on published I3D features with ActionFormer: the recipe of arXiv 2202.07925 as its authors run it.

    .venv/bin/python -m re2tal_jax.main --config configs/thumos_features.py --config.data.features.folder=…

No backbone and no videos: 2048 channels a row (RGB and flow), each of 16 frames, a row every 4 frames. Windows of 2304
snippets, 20 classes, 35 epochs. Published mAP (tIoU .3/.4/.5/.6/.7, average): 82.13/77.80/70.95/59.40/43.87, 66.83.
Two differences: test videos longer than a window are evaluated in overlapping windows, there in one piece; segments of
CliffDiving are learnt here, there left out of training. Hardware: one GPU of 8 GB. Hours and mAP of this
implementation: not measured yet. docs/features.md says what the files are.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the complete configuration."""
    loader = dict(height=None, width=None, workers=0, threads=4, ahead=8, cache_mib=0, on_error="error")
    return ConfigDict(
        dict(
            seed=42,
            compute_dtype="float32",
            num_snippets=2304,
            frames_per_snippet=1,
            num_classes=20,
            data=dict(
                name="thumos14",
                annotations="data/thumos/thumos14.json",
                videos=None,
                features=dict(folder="data/thumos/i3d_features", stride=4, offset_frames=8.0),
                missing_videos="error",
            ),
            train=dict(
                subset="Validation",  # THUMOS trains on its validation videos; the name is that of the annotation file
                batch_size=2,
                policy=dict(
                    name="random_trunc", snippet_stride=4, offset_frames=8, min_overlap=0.5, crop_ratio=(0.9, 1.0)
                ),
                loader=dict(loader),
                augment=None,
                mirror=None,
            ),
            eval=dict(
                subset="Test",
                batch_size=2,
                policy=dict(name="sliding_window", snippet_stride=4, offset_frames=8, overlap=0.5),
                loader=dict(loader),
                augment=None,
                mirror=None,
            ),
            backbone=dict(name="features", channels=2048, checkpoint=None),
            localizer=dict(
                name="actionformer",
                channels=512,
                arch=(2, 2, 5),
                num_heads=4,
                window=19,
                use_abs_pos=False,
                max_seq_len=2304,
                path_drop_rate=0.1,
                regression_range=((0, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 10000)),
                label_smoothing=0.0,
                reg_loss_weight=1.0,
                loss_normalizer=100.0,
            ),
            detector=dict(pixel_mean=None, pixel_std=None, snippet_loss_weight=0.0),
            parameter_groups=dict(localizer_lr=1e-4, backbone_lr=None, weight_decay=0.05),
            optimizer=dict(
                schedule=dict(decay="cosine", length=dict(epochs=35), warmup=dict(epochs=5), min_lr=1e-8),
                b1=0.9,
                b2=0.999,
                clip_norm=1.0,
                ema_decay=0.999,
                accumulate=1,
            ),
            mesh=dict(data=-1, fsdp=1),
            distributed=None,
            loop=dict(
                stop=dict(epochs=35),
                evaluate_every=dict(epochs=5),
                checkpoint_every=dict(steps=500),
                log_every_steps=20,
            ),
            checkpoints=dict(keep_latest=1, keep_best=1, best_metric="average_mAP"),
            postprocess=dict(
                nms=dict(
                    method="gaussian",
                    sigma=0.5,
                    min_score=0.001,
                    max_seg_num=200,
                    multiclass=True,
                ),
                suppress_in="video",
            ),
            external_classifier=None,
            evaluation=dict(tiou_thresholds=(0.3, 0.4, 0.5, 0.6, 0.7), blocked=None),
        )
    )
