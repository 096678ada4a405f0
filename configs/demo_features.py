r"""The demo's localizer on features of the demo's videos: what an end-to-end run is compared with.

    make demo
    .venv/bin/python -m re2tal_jax.main --config configs/demo.py --workdir runs/demo \
        --mode extract --out runs/demo/features
    .venv/bin/python -m re2tal_jax.main --config configs/demo_features.py

Everything behind the backbone is that of configs/demo.py; the backbone is left out, its features are read. Mirroring
needs frames, so it is off.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the complete configuration."""
    loader = dict(height=None, width=None, workers=0, threads=2, cache_mib=64, on_error="error")
    return ConfigDict(
        dict(
            seed=0,
            compute_dtype="float32",
            num_snippets=48,
            frames_per_snippet=2,
            num_classes=6,
            data=dict(
                name="synthetic",
                root="runs/demo/data",
                num_train=240,
                num_validation=40,
                seed=0,
                features=dict(folder="runs/demo/features"),
            ),
            train=dict(
                subset="training",
                batch_size=4,
                policy=dict(name="resize"),
                loader=dict(loader),
                augment=None,
                mirror=None,
            ),
            eval=dict(
                subset="validation",
                batch_size=4,
                policy=dict(name="resize"),
                loader=dict(loader),
                augment=None,
                mirror=None,
            ),
            backbone=dict(name="features", channels=64, checkpoint=None),
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
            detector=dict(pixel_mean=None, pixel_std=None, snippet_loss_weight=5.0),
            parameter_groups=dict(localizer_lr=1.8e-3, backbone_lr=None, weight_decay=0.05),
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
