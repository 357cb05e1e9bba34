"""TorchScript archives read as data: the tensors of torch.jit.load, no code run, damage named."""

import io
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from model.torchscript import follow, script_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning",
                                        "ignore:.*torch.jit.*:FutureWarning")


class Net(nn.Module):
    """All that a module tree may hold: views of one storage, a transposed weight, a scalar, lists and dicts, a
    module in two places."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        self.again = self.body
        self.turned = nn.Parameter(torch.rand(6, 4).t())
        self.part = nn.Parameter(self.body[0].weight[1].detach())
        self.register_buffer("empty", torch.zeros(0, 3))
        self.short = nn.Parameter(torch.rand(5).half())
        self.numbers, self.table = [1, 2, 70000], {"x": 1.5}

    def forward(self, x):
        return self.body(x)


class Writes(nn.Module):
    """Its code, kept in the archive, writes a file when it is loaded."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.register_buffer("weight", torch.ones(2))

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
        self.weight, self.path, self.training = state
        torch.save(self.weight, self.path)

    def forward(self, x: torch.Tensor):
        return x


@pytest.fixture
def archive(tmp_path) -> Path:
    torch.manual_seed(0)
    torch.jit.script(Net()).save(tmp_path / "net.pt")
    return tmp_path / "net.pt"


def repack(path: Path, change) -> None:
    """Write the archive anew, sound as a zip file, each member's bytes through `change(name, bytes)`."""
    source, out = zipfile.ZipFile(path), io.BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    path.write_bytes(out.getvalue())


@pytest.mark.parametrize("traced", [False, True])
def test_the_tensors_of_jit_load(tmp_path, traced):
    net = Net().eval()
    module = torch.jit.trace(net, torch.rand(1, 3, 5, 5)) if traced else torch.jit.script(net)
    module.save(tmp_path / "net.pt")
    found, expected = script_tensors(tmp_path / "net.pt"), torch.jit.load(tmp_path / "net.pt").state_dict()
    assert found.keys() == expected.keys() and len(found) == 16
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_no_code_of_the_file_runs(tmp_path):
    """Compiled and loaded, the archive writes a file; read here it does not."""
    trace = tmp_path / "written"
    torch.jit.script(Writes(str(trace))).save(tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt: .*has no attributes but what code of its own would make"):
        script_tensors(tmp_path / "evil.pt")
    assert not trace.exists()
    torch.jit.load(tmp_path / "evil.pt")
    assert trace.exists()


def test_what_the_pickle_would_call_is_not_called(tmp_path, capfd):
    value = follow(b"\x80\x02cbuiltins\nprint\nX\x04\x00\x00\x00evil\x85R.")
    assert (value.name, value.args) == ("builtins print", ("evil",)) and not capfd.readouterr().out
    with pytest.raises(ValueError, match="opcode INST"):  # none of TorchScript's
        follow(b"(ibuiltins\nprint\n.")


def test_other_files_are_none(tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "plain.pt")
    (tmp_path / "text.pt").write_text("no archive")
    assert script_tensors(tmp_path / "plain.pt") is None and script_tensors(tmp_path / "text.pt") is None


@pytest.mark.parametrize(
    "old, new, reason",
    [
        (b"K\x18t", b"K\x17t", "storage 0 has 96 bytes, not 23 torch.float32"),  # 24 numbers
        (b"K\x00(K\x04K\x06t", b"K\x01(K\x04K\x06t", r"size \(4, 6\) reaches beyond its storage of 24"),
        (b"K\x00(K\x04K\x06t", b"K\x00(K\x04K\xfft", r"size \(4, 255\) reaches beyond"),
        (b"(K\x01K\x04t", b"(K\x01K\x09t", r"size \(4, 6\) reaches beyond"),  # the stride
        (b"K\x00(K\x04K\x06t", b"\x89(K\x04K\x06t", "offset False"),
        (b"HalfStorage", b"EvilStorage", "KeyError: 'torch EvilStorage'"),
    ],
)
def test_tensors_stay_inside_their_storage(archive, old, new, reason):
    def change(name, data):
        assert not name.endswith("data.pkl") or old in data
        return data.replace(old, new, 1) if name.endswith("data.pkl") else data

    repack(archive, change)
    with pytest.raises(ValueError, match=f"net.pt: not a readable TorchScript archive .*{reason}"):
        script_tensors(archive)


def test_loops_and_compression_are_refused(archive, tmp_path):
    module = b"c__torch__\nM\n)\x81q\x00}(X\x01\x00\x00\x00ah\x00ub."  # a module that is its own child
    repack(archive, lambda name, data: module if name.endswith("data.pkl") else data)
    with pytest.raises(ValueError, match="its modules contain each other"):
        script_tensors(archive)
    twice = [b"c__torch__\nM\n)\x81}(X\x01\x00\x00\x00a%sX\x01\x00\x00\x00b%subq%c" % (child, child, i)
             for i, child in enumerate([b"N", *(b"h%c" % i for i in range(40))])]  # the last in 2^40 places
    repack(archive, lambda name, data: b"".join(twice) + b"." if name.endswith("data.pkl") else data)
    with pytest.raises(ValueError, match="its modules contain each other"):
        script_tensors(archive)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("a/code/x", b"")
        bomb.writestr("a/data.pkl", b"\x00" * 10**6)
    with pytest.raises(ValueError, match="bomb.pt: .*its data is compressed"):
        script_tensors(tmp_path / "bomb.pt")


def test_damage_is_named(archive):
    """Cut off anywhere, or one byte changed anywhere: the same tensors, none, or a ValueError."""
    good = archive.read_bytes()
    for at in range(0, len(good), max(1, len(good) // 150)):
        flipped = good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :]
        for damaged in (good[:at], flipped):
            archive.write_bytes(damaged)
            try:
                script_tensors(archive)
            except ValueError as error:
                assert str(archive) in str(error) and "\n" not in str(error)
