"""What the code that travels with a checkpoint may do: the one list of its accesses to files and network, and a reader of code.

A test holds the code against the list in both directions, and `docs/security.md` has the list as its table:
`python -m devil_hf.hub.travelling docs/security.md` writes it there.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOM = Path(__file__).parents[1] / "model"
# Those that travel only with checkpoints that need them, see `COMPANIONS` in checkpoint_devil.py.
COMPANIONS = (ROOM.parent / "baselines" / "baselines_devil.py", *sorted((ROOM.parent / "build").glob("*_devil.py")))
LIBRARIES = {"PIL", "huggingface_hub", "numpy", "peft", "safetensors", "timm", "torch", "transformers"}
STANDARD = {
    "base64", "binascii", "collections", "contextlib", "copy", "dataclasses", "functools", "hashlib", "importlib", "inspect",
    "io", "json", "math", "operator", "os", "pathlib", "re", "sys", "threading", "typing",
}  # fmt: skip
OF_OS = {"PathLike", "fspath", "listdir", "path"}
FORBIDDEN = {"__import__", "breakpoint", "compile", "eval", "exec", "globals", "input", "open"}
# The last name of every call that touches files, the network, or code by name.
TOUCHING = {
    "cached_file", "create_commit", "create_model", "exists", "from_pretrained", "fromfile", "get_session", "hf_hub_download",
    "import_module", "isdir", "listdir", "load", "load_file", "load_state_dict", "makedirs", "memmap", "mkdir", "open",
    "popen", "push_to_hub", "read_bytes", "read_text", "rename", "rmdir", "rmtree", "safe_open", "save", "save_file",
    "save_pretrained", "savez", "snapshot_download", "system", "tofile", "touch", "unlink", "upload_file", "upload_folder",
    "urlopen", "urlretrieve", "write_bytes", "write_text",
}  # fmt: skip


@dataclass(frozen=True)
class Access:
    """One call in a travelling file, and all that it may touch."""

    file: str
    call: str
    when: str
    touches: str


ACCESSES = (
    Access("checkpoint_devil.py", "cls.config_class.from_pretrained", "loading", "the checkpoint's config.json"),
    Access("checkpoint_devil.py", "cached_file", "loading", "the checkpoint's safetensors files and the list of them"),
    Access("checkpoint_devil.py", "Path(index).read_text", "loading a checkpoint in shards", "the list of them"),
    Access("checkpoint_devil.py", "load_file", "loading", "the same files, by safetensors"),
    Access("checkpoint_devil.py", "super().from_pretrained", "loading", "nothing: it is given the weights"),
    Access("checkpoint_devil.py", "super().save_pretrained", "saving", "the directory that you name"),
    Access("checkpoint_devil.py", "self.config.save_pretrained", "saving", "the directory that you name"),
    Access("checkpoint_devil.py", "(folder / 'config.json').read_text", "saving", "the same directory's config.json"),
    Access("checkpoint_devil.py", "file.read_text", "saving", "a companion's own file"),
    Access("checkpoint_devil.py", "(folder / file.name).write_text", "saving",
           "the companion's file in the directory that you name"),
    Access("checkpoint_devil.py", "(folder / f'{ENTRY}.py').write_text", "saving", "the file there that imports the companions"),
    Access("pipeline_devil.py", "self.model.save_pretrained", "saving a pipeline", "the directory that you name"),
    Access("pipeline_devil.py", "self.processor.save_pretrained", "saving a pipeline", "the directory that you name"),
    Access("image_processing_devil.py", "Image.open", "giving a path, URL or base64 text as an image", "that file"),
    Access("image_processing_devil.py", "os.path.exists", "giving a text as an image", "whether there is such a file"),
    Access("image_processing_devil.py", "get_session", "giving an http or https URL as an image", "one GET of that URL"),
    Access("timm_devil.py", "timm.create_model", "building", "nothing: an architecture of timm's, without weights; loading a "
           "slim checkpoint, the file of weights in the folder of its source"),
    Access("transformers_devil.py", "importlib.import_module", "building",
           "a `modeling_*` file of transformers' own models; anything else is refused"),
    Access("slim_devil.py", "os.path.isdir", "loading a slim checkpoint", "whether a source is a directory"),
    Access("slim_devil.py", "os.listdir", "loading a slim checkpoint", "names of files in the folder of a source"),
    Access("slim_devil.py", "snapshot_download", "loading a slim checkpoint",
           "`*.json` and `*.safetensors` of a source (`*.bin` where there are no others, read with `weights_only`), at the "
           "recorded commit, from the Hub's cache or the Hub"),
    Access("slim_devil.py", "safe_open", "loading a slim checkpoint", "types of the weights in the folder of a source"),
    Access("slim_devil.py", "AutoModel.from_pretrained", "loading a slim checkpoint", "weights in the folder of a source"),
    Access("slim_devil.py", "kind.from_pretrained", "loading a slim checkpoint", "weights in the folder of a source"),
    Access("slim_devil.py", "AutoModelForCausalLM.from_pretrained", "loading a slim checkpoint",
           "weights in the folder of a source"),
)  # fmt: skip


def travelling_files() -> list[Path]:
    """The files that travel with every checkpoint: all of the room `model`."""
    return sorted(ROOM.glob("*_devil.py"))


def accesses(file: Path) -> set[str]:
    """The calls of a file that touch files, the network, or code by name."""
    calls = (node.func for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return {ast.unparse(call) for call in calls if ast.unparse(call).rpartition(".")[2] in TOUCHING}


def violations(file: Path) -> Iterator[str]:
    """What a travelling file must not have: other imports, code from text, its own ways to files and network."""
    nodes: Iterator[Any] = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            beside = node.level == 1 and (file.parent / f"{node.module}.py").exists()
            names = [] if beside else ["." * node.level + (node.module or "")]
            if node.module == "os":
                names += [f"of os {alias.name}" for alias in node.names if alias.name not in OF_OS]
        else:
            names = []
            of_os = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os" and node.attr not in OF_OS
            if of_os or (isinstance(node, ast.Name) and node.id in FORBIDDEN):
                yield f"{file.name}:{node.lineno} uses {ast.unparse(node)}"
        for name in names:
            travels = name.startswith("devil_hf.model.") or name in {f"devil_hf.build.{other.stem}" for other in COMPANIONS}
            if name.partition(".")[0] not in LIBRARIES | STANDARD and not (file in COMPANIONS and travels):
                yield f"{file.name}:{node.lineno} imports {name}"
    listed = {access.call for access in ACCESSES if access.file == file.name}
    yield from (f"{file.name} calls {call}, which is not listed" for call in sorted(accesses(file) - listed))


def table() -> str:
    """The list of accesses, in Markdown."""
    rows = [f"| `{one.file}` | `{one.call}` | {one.when} | {one.touches} |" for one in ACCESSES]
    return "\n".join(["| file | call | when | what it may touch |", "|---|---|---|---|", *rows])


def write_table(page: Path) -> None:
    """Put the table into a page, in place of the first one that it has."""
    lines = page.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    end = next((number for number, line in enumerate(lines) if number > first and not line.startswith("|")), len(lines))
    lines[first:end] = table().splitlines()
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_table(Path(sys.argv[1]))

__all__ = ["ACCESSES", "COMPANIONS", "Access", "accesses", "table", "travelling_files", "violations", "write_table"]
