"""Names of the Hugging Face hub in place of folders: from the cache, or from the network where there is one."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
_NOT_NEEDED = ["*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "original/*", "*.mlpackage/*"]


def on_disk(model: Path | str) -> Path:
    """The folder of a model: as it is, or of the hub's model of that name, which is downloaded if it must be.

    A path that exists, or cannot be a hub's name, is returned as it is.

    Raises:
        FileNotFoundError: the hub's model is not in the cache, and cannot be downloaded: says how to get it.
    """
    path, name = Path(model), str(model)
    if path.exists() or not _NAME.fullmatch(name):
        return path
    try:
        return Path(huggingface_hub.snapshot_download(name, ignore_patterns=_NOT_NEEDED))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{name}: no such folder, and no such model in the hub's cache or to be downloaded now ({reason}); "
            f"expected a model folder, or a hub name that is reachable: where there is a network run hf download {name}"
            f" --local-dir {path.name}, and give that folder"
        ) from None
