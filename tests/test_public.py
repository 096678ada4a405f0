"""What `import re2tal_jax` offers."""

import re2tal_jax


def test_every_public_name_resolves():
    for name in re2tal_jax.__all__:
        assert getattr(re2tal_jax, name) is not None
    assert dir(re2tal_jax) == re2tal_jax.__all__


def test_registries_are_listed():
    assert "video_swin_tiny" in re2tal_jax.list_backbones()
    assert "actionformer" in re2tal_jax.list_localizers()
    assert {"activitynet", "synthetic", "thumos14"} <= set(re2tal_jax.list_datasets())


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(re2tal_jax, "no_such_name")
