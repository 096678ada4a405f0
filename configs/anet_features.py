"""ActivityNet-1.3 on published TSP features with ActionFormer: the recipe of arXiv 2202.07925 as its authors run it.

    .venv/bin/python -m re2tal_jax.main --config configs/anet_features.py --config.data.features.folder=…

No backbone and no videos: 512 channels a row, a row every 16 frames of videos at 15 frames a second, resized to 192
snippets. One class and an external classifier, 15 epochs. Published average mAP with the CUHK classifier: 36.56 (tIoU
.5/.75/.95: 54.67/37.81/8.36); it leaves out the videos that have no features, of training and of validation (name those
as --config.evaluation.blocked, here they count as missed). Local attention over 7 snippets on all levels but the last.
Hardware: one small GPU. Hours and mAP of this implementation: not measured yet. docs/features.md says what the files
are.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the complete configuration."""
    loader = dict(height=None, width=None, workers=0, threads=4, ahead=16, cache_mib=4096, on_error="error")
    return ConfigDict(
        dict(
            seed=42,
            compute_dtype="float32",
            num_snippets=192,
            frames_per_snippet=1,
            num_classes=1,
            data=dict(
                name="activitynet",
                annotations="data/activitynet/activity_net.v1-3.min.json",
                videos=None,
                features=dict(folder="data/activitynet/tsp_features", stride=16, offset_frames=8.0),
                fps=15.0,  # the features are of videos re-encoded to it
                class_agnostic=True,
                min_length_ratio=0.0,
                missing_videos="skip",
            ),
            train=dict(
                subset="training",
                batch_size=16,
                policy=dict(name="resize"),
                loader=dict(loader),
                augment=None,
                mirror=None,
            ),
            eval=dict(
                subset="validation",
                batch_size=16,
                policy=dict(name="resize"),
                loader=dict(loader),
                augment=None,
                mirror=None,
            ),
            backbone=dict(name="features", channels=512, checkpoint=None),
            localizer=dict(
                name="actionformer",
                channels=256,
                arch=(2, 2, 5),
                num_heads=4,
                window=(7, 7, 7, 7, 7, -1),
                use_abs_pos=True,
                max_seq_len=192,
                path_drop_rate=0.1,
                regression_range=((0, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 10000)),
                label_smoothing=0.1,
                reg_loss_weight=2.0,
                loss_normalizer=200.0,
            ),
            detector=dict(pixel_mean=None, pixel_std=None, snippet_loss_weight=0.0),
            parameter_groups=dict(localizer_lr=1e-3, backbone_lr=None, weight_decay=0.05),
            optimizer=dict(
                schedule=dict(decay="cosine", length=dict(epochs=15), warmup=dict(epochs=5), min_lr=1e-8),
                b1=0.9,
                b2=0.999,
                clip_norm=1.0,
                ema_decay=0.999,
                accumulate=1,
            ),
            mesh=dict(data=-1, fsdp=1),
            distributed=None,
            loop=dict(
                stop=dict(epochs=15),
                evaluate_every=dict(epochs=1),
                checkpoint_every=dict(steps=500),
                log_every_steps=50,
            ),
            checkpoints=dict(keep_latest=1, keep_best=1, best_metric="average_mAP"),
            postprocess=dict(
                nms=dict(
                    method="gaussian",
                    sigma=0.75,
                    min_score=0.001,
                    max_seg_num=100,
                    multiclass=False,
                    voting_threshold=0.9,
                ),
                suppress_in="window",
            ),
            external_classifier=dict(path="data/activitynet/cuhk_val_simp_7.json", top_k=2, fusion="product"),
            evaluation=dict(tiou_thresholds=(0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95), blocked=None),
        )
    )
