"""Which classes a configuration may name: an allow-list, checked before anything of that name is imported.

A configuration is data. Naming ``os.system`` in it must not run it, and must not even import the module.
"""

from __future__ import annotations

from collections.abc import Sequence

from descant.errors import Refusal

ALLOWED = ("descant", "torch", "lightning", "timm", "transformers", "peft", "bitsandbytes", "torchmetrics")
#: Parts of the allowed packages that load code, files or processes, or build any class by its name.
DENIED = (
    *(
        "torch.hub",
        "torch.utils",
        "torch.jit",
        "torch.package",
        "torch.load",
        "torch.save",
        "torch.serialization",
    ),
    *("torch.ops", "torch.classes", "torch._ops", "torch._classes", "torch.multiprocessing", "torch.fx"),
    *(
        "torch.distributed.run",
        "torch.distributed.launch",
        "torch.distributed.launcher",
        "torch.distributed.elastic",
    ),
    *(
        "torch.distributed.rpc",
        "torch.testing",
        "torch.onnx",
        "torch._inductor",
        "torch._dynamo",
        "torch.export",
    ),
    *("lightning.pytorch.cli", "lightning.fabric.cli", "lightning.app", "lightning.pytorch.core.saving"),
    *(
        "transformers.dynamic_module_utils",
        "transformers.pipeline",
        "transformers.pipelines",
        "transformers.commands",
    ),
    *("transformers.cli", "transformers.utils"),
    *("descant.cli", "descant.__main__"),
)

_trusted: set[str] = set()


def allowed(path: str, trust: Sequence[str] = ()) -> bool:
    """Whether a class path lies in an allowed package and in no denied part of it: the longest entry decides.

    >>> [allowed(path) for path in ("torch.optim.AdamW", "torch.hub.load", "os.system")]
    [True, False, False]
    >>> allowed("os.system", ["os"])
    True
    """
    verdicts = {**dict.fromkeys(ALLOWED, True), **dict.fromkeys(DENIED, False), **dict.fromkeys(trust, True)}
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        entry = ".".join(parts[:n])
        if entry in verdicts:
            return verdicts[entry]
    return False


def require(path: str, trust: Sequence[str] = ()) -> None:
    """Raises Refusal if a class path is outside the allow-list."""
    if allowed(path, trust):
        return
    part = next((d for d in DENIED if path == d or path.startswith(d + ".")), None)
    if part is not None:
        raise Refusal(f"class_path {path} is in {part}, which may load code: --trust {part} if you trust it")
    top = path.split(".")[0]
    raise Refusal(f"class_path {path} is outside the allow-list ({', '.join(ALLOWED)}): --trust {top} if you trust it")


def enforce(trust: Sequence[str] = ()) -> None:
    """Give jsonargparse the same list: the second wall, for whatever else in a file names an object."""
    from jsonargparse import set_parsing_settings

    forgotten = sorted(_trusted - set(trust))  # settings are global: what an earlier call trusted is trusted no more
    set_parsing_settings(
        import_path_denylist=["*", *DENIED, *forgotten],
        import_path_allowlist=[*ALLOWED, *trust],
        instantiate_subclass_spec_in_any=False,
    )
    _trusted.update(trust)
