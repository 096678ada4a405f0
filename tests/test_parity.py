"""Every public golden file of what is built so far, through the same door as `python -m tests.parity`."""

import pytest

from tests.parity.__main__ import main, replay

FILES = (
    "swin_plain.npz",
    "swin_inv.npz",
    "swin_inv_w433.npz",
    "slowfast_plain.npz",
    "slowfast_inv.npz",
    "vit_videomae.npz",
    "vit_videomae_pooled.npz",
    "actionformer_thumos_local19.npz",
    "actionformer_thumos_global.npz",
    "actionformer_anet_abspe.npz",
    "vsgn_anet.npz",
    "vsgn_thumos.npz",
    "vsgn_thumos_gcn.npz",
    "vsgn_postproc.npz",
    "e2e_anet_re2swin.npz",
    "nms.npz",
    "postproc.json",
    "cuhk_like.json",
    "map",
    "data",
    "optim",
)


@pytest.mark.parametrize("name", FILES)
def test_golden_file_is_reproduced(parity_dir, name):
    rows = replay(parity_dir / name)
    assert rows
    failed = [f"{row.name}: {row.error:.2e} > {row.tolerance:.2e}" for row in rows if not row.passed]
    assert not failed, "\n".join(failed[:20])


def test_a_row_beyond_its_tolerance_fails_the_command(parity_dir, tmp_path, capsys):
    """The command can fail: one number of a copied file is changed."""
    folder = tmp_path / "map"
    folder.mkdir()
    for file in (parity_dir / "map").glob("thumos_s0_*.json"):
        (folder / file.name).write_text(file.read_text().replace('"average_mAP": 0.2', '"average_mAP": 0.3'))
    assert main([str(folder)]) == 1
    assert "FAIL" in capsys.readouterr().out
