"""ActivityNet-1.3 with Re2 Video Swin-T and ActionFormer: the recipe of Re2TAL (arXiv 2211.14053) as OpenTAD ran it.

    .venv/bin/python -m re2tal_jax.main --config configs/anet.py --config.data.annotations=… --config.data.videos=…

Whole videos as 768 frames at 224 x 224, one class and an external classifier, 15 epochs. docs/data.md says where each
file goes. Hardware of the published run: 4 GPUs, batch 8 (--config.mesh.data=4). Here a step of batch 8 plans 18.9 GB
on one device, compiled for an H100: one GPU of 24 GB should hold it (--mode inspect tells the memory of your values).
Published average mAP with the CUHK classifier: 36.47 (tIoU .5/.75/.95: 55.08/37.05/8.29), from a backbone fine-tuned on
Kinetics-400 after rewiring: name yours as --config.backbone.checkpoint, without one frozen norms and a rate of 1e-5
leave it random. There, videos that cannot be had do not count (--config.evaluation.blocked); here they count as missed
until you list them. Hours and mAP of this implementation on the real videos: not measured yet.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the complete configuration."""
    loader = dict(workers=8, threads=2, ahead=2, cache_mib=0, on_error="error")
    return ConfigDict(
        dict(
            seed=42,
            compute_dtype="bfloat16",
            num_snippets=192,
            frames_per_snippet=4,
            num_classes=1,
            data=dict(
                name="activitynet",
                annotations="data/activitynet/activity_net.v1-3.min.json",
                videos="data/activitynet/videos",
                class_agnostic=True,
                min_length_ratio=0.01,
                missing_videos="skip",
            ),
            train=dict(
                subset="training",
                batch_size=8,
                policy=dict(name="resize"),
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
                subset="validation",
                batch_size=8,
                policy=dict(name="resize"),
                loader=dict(loader, height=224, width=224, crop="center"),
                augment=dict(height=224, width=224, dtype="uint8"),
                mirror=None,
            ),
            backbone=dict(name="video_swin_tiny", rewired=True, checkpoint=None, drop_path_rate=0.2),
            localizer=dict(
                name="actionformer",
                channels=256,
                arch=(2, 2, 5),
                num_heads=4,
                window=-1,
                use_abs_pos=True,
                max_seq_len=192,
                path_drop_rate=0.1,
                regression_range=((0, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 10000)),
                label_smoothing=0.1,
                reg_loss_weight=2.0,
                loss_normalizer=200.0,
            ),
            detector=dict(
                pixel_mean=(123.675, 116.28, 103.53), pixel_std=(58.395, 57.12, 57.375), snippet_loss_weight=0.0
            ),
            parameter_groups=dict(localizer_lr=1e-3, backbone_lr=1e-5, weight_decay=0.05, freeze_backbone_norms=True),
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
                log_every_steps=20,
            ),
            checkpoints=dict(keep_latest=1, keep_best=1, best_metric="average_mAP"),
            postprocess=dict(
                nms=dict(
                    method="gaussian",
                    sigma=0.7,
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
