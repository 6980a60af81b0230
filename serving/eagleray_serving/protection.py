"""What the command line says about a server's edge: keys, TLS, the access log; decided before anything starts."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eagleray.errors import UsageError
from eagleray_serving.keys import ApiKey, KeyFile, keys_of

KEYS_VARIABLE = "EAGLERAY_API_KEYS"
KEYS_FILE = "keys.json"
NO_LOG = "none"


@dataclass(frozen=True, slots=True)
class Protection:
    """What a server's processes are told; holds no key.

    Attributes:
        keys: File of the keys' hashes; None: nobody is asked for one.
        access_log: The access log; None: none is written.
        has_addresses: Whether the access log says where a request came from.
    """

    keys: str | None = None
    access_log: str | None = None
    has_addresses: bool = False

    def as_args(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> Protection:
        """Rebuild it from plain values."""
        return cls(**args)


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate chain and its private key, as PEM files."""

    chain: Path
    key: Path

    def check(self) -> None:
        """Refuse what no client could be served with.

        Raises:
            UsageError: A file cannot be read, or they do not belong together.
        """
        try:
            # The password is asked on the terminal otherwise.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.chain, self.key, password=lambda: b"")
        except OSError as error:  # ssl.SSLError is one
            raise UsageError(
                f"{self.chain} and {self.key} are no certificate and its key: {error.strerror or error}",
                "both are PEM files, the key without a password; --tls-cert holds the whole chain",
            ) from None

    def pem(self) -> bytes:
        """Return both as the one file that HAProxy reads."""
        return self.chain.read_bytes().rstrip() + b"\n" + self.key.read_bytes().rstrip() + b"\n"


@dataclass(frozen=True, slots=True)
class EdgeOptions:
    """What the command line says.

    Attributes:
        keys: File of the keys' hashes, in use from here on.
        own_keys: Keys of the environment, to be kept in the server's own folder.
        access_log: The access log's path; `none` for none; None: where the server's other logs are.
        has_addresses: Whether the access log says where a request came from.
        certificate: For TLS; None: plain HTTP.
        is_insecure: Whether everybody may use the server, wherever it listens.
        words: The same as words of the command line, for a server that is started in another process.
    """

    keys: Path | None = None
    own_keys: tuple[ApiKey, ...] = ()
    access_log: str | None = None
    has_addresses: bool = False
    certificate: Certificate | None = None
    is_insecure: bool = False
    words: tuple[str, ...] = ()

    @property
    def has_keys(self) -> bool:
        """Whether a request needs a key."""
        return self.keys is not None or bool(self.own_keys)

    def protection(self, default_log: Path | None, folder: Path | None = None) -> Protection:
        """Return what the server's processes are told; writes the keys of the environment into its folder."""
        keys = self.keys
        if self.own_keys:
            assert folder is not None, "keys of the environment are for a server with a folder of its own"
            keys = folder / KEYS_FILE
            KeyFile(keys).write(self.own_keys)
        return Protection(None if keys is None else str(keys), self.log_path(default_log), self.has_addresses)

    def log_path(self, default_log: Path | None) -> str | None:
        """Return where the access log is written; None where it is not."""
        log = default_log if self.access_log is None else Path(self.access_log)
        return None if log is None or self.access_log == NO_LOG else str(log.absolute())


def trusting(chain: str | Path | None) -> ssl.SSLContext:
    """Return what trusts exactly the certificate of a server of ours, whatever name it is for."""
    context = ssl.create_default_context(cafile=None if chain is None else str(chain))
    if chain is not None:
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def edge_options(
    host: str,
    *,
    keys: Path | None,
    insecure: bool,
    home: Path,
    environ: Mapping[str, str],
    is_joining: bool = False,
    tls: tuple[Path | None, Path | None] = (None, None),
    access_log: str | None = None,
    log_addresses: bool = False,
) -> EdgeOptions:
    """Decide who is asked for a key, and whether that will do for where the server listens.

    Args:
        host: Address to listen on.
        keys: The file that `--keys` names.
        insecure: Whether `--insecure-no-keys` was said.
        home: `~/.eagleray`: its `keys.json` is used where no other is named.
        environ: The environment: `EAGLERAY_API_KEYS`.
        is_joining: Whether the server is on a cluster that runs already.
        tls: Certificate and key.
        access_log: Path of the access log; `none` for none.
        log_addresses: Whether the access log says where a request came from.

    Raises:
        UsageError: What was said contradicts itself, or opens the server to a network without keys.
        ServingError: The keys cannot be read.
    """
    keys, own_keys = _chosen_keys(keys, environ.get(KEYS_VARIABLE, ""), home, insecure, is_joining)
    found = EdgeOptions(
        keys,
        own_keys,
        access_log,
        log_addresses,
        _certificate(*tls, is_joining=is_joining),
        insecure,
        _words(keys, insecure, tls, access_log, log_addresses),
    )
    if not found.has_keys and not insecure and not is_loopback(host):
        raise UsageError(
            f"--host {host} opens the server to a network, and it has no keys",
            "make one: eagleray keys add NAME; or say that everybody may use it: --insecure-no-keys",
        )
    return found


def _chosen_keys(
    keys: Path | None, given: str, home: Path, insecure: bool, is_joining: bool
) -> tuple[Path | None, tuple[ApiKey, ...]]:
    """Return the file of the keys, or those of the environment."""
    if insecure and keys is not None:
        raise UsageError("--keys and --insecure-no-keys contradict each other", "leave one of them out")
    if insecure:
        return None, ()
    if keys is None and given and is_joining:
        raise UsageError(
            f"{KEYS_VARIABLE} does not reach the replicas of a cluster that runs already",
            "name a file that every node sees: --keys PATH",
        )
    if keys is None and (own_keys := keys_of(given)):
        return None, own_keys
    if keys is None and (home / KEYS_FILE).exists():
        keys = home / KEYS_FILE
    if keys is None:
        return None, ()
    keys = keys.absolute()
    if not KeyFile(keys).read():
        raise UsageError(
            f"{keys} holds no key: nobody could ask anything",
            "eagleray keys add NAME makes one; --insecure-no-keys asks nobody for one",
        )
    return keys, ()


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _certificate(chain: Path | None, key: Path | None, *, is_joining: bool) -> Certificate | None:
    if chain is None and key is None:
        return None
    if chain is None or key is None:
        raise UsageError("--tls-cert and --tls-key go together", "name both, or neither")
    if is_joining:
        raise UsageError(
            "TLS ends at the front, and that of a cluster that runs already is not ours to set up",
            "put what ends TLS before it, or serve without --address",
        )
    found = Certificate(chain.absolute(), key.absolute())
    found.check()
    return found


def _words(
    keys: Path | None,
    insecure: bool,
    tls: tuple[Path | None, Path | None],
    access_log: str | None,
    log_addresses: bool,
) -> tuple[str, ...]:
    named = {"--keys": keys, "--tls-cert": tls[0], "--tls-key": tls[1], "--access-log": access_log}
    words = [word for option, value in named.items() if value is not None for word in (option, str(value))]
    words += ["--insecure-no-keys"] if insecure else []
    return (*words, *(["--log-addresses"] if log_addresses else []))
