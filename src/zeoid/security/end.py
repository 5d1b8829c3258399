"""One end of a TLS connection: bytes in, bytes out. No socket, no wait.

    state      event                                         becomes
    shaking    `receive` brought the last of the handshake   ready
    ready      the other end says that it ends (close_notify)  finished
    any        what comes can't be                           broken: EncryptionError is raised

Whatever is called, `output` afterwards has what is to be sent, also after an EncryptionError: it tells the
other end why. Calls must not overlap: OpenSSL's object is one thread's at a time. What is sent must leave in
the order in which `output` gave it. What `receive` makes our side say once it is ready (an answer to a
change of keys) may leave with the next message: it is due before that, and no earlier (RFC 8446, 4.6.3).

OpenSSL bounds what it keeps: of one record, and in a handshake of messages that fit its state.

Owns OpenSSL's object and its two buffers. Must not know who is trusted: that is the context's.
"""

import contextlib
import ssl

from zeoid import limits
from zeoid.errors import EncryptionError
from zeoid.security.reasons import in_words, is_other_name

_RECORD_BYTES = limits.TLS_RECORD_BYTES


class End:
    """See the module."""

    __slots__ = (
        "_incoming",
        "_outgoing",
        "_server_hostname",
        "_server_side",
        "_tls",
        "begun",
        "context",
        "finished",
        "met_other_name",
        "ready",
    )

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        """EncryptionError: *server_hostname* can't be one. A *session* is one that the same context made."""
        self.context = context
        self._server_side = context.protocol == ssl.PROTOCOL_TLS_SERVER
        self._server_hostname = server_hostname
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        try:
            self._tls = context.wrap_bio(
                self._incoming,
                self._outgoing,
                server_side=self._server_side,
                server_hostname=server_hostname,
                session=session,
            )
        except ValueError as problem:  # empty, too long, or with a dot in front
            raise EncryptionError(f"{server_hostname!r} is no name of a server: {problem}") from None
        #: Whether the other end has sent anything.
        self.begun = False
        #: Whether the handshake is done: `send` may be called.
        self.ready = False
        #: Whether the other end has said that it ends. A stream that ends without that was cut.
        self.finished = False
        #: Whether the other end's certificate is a good one, but for another host.
        self.met_other_name = False
        if not self._server_side:
            self._shake_hands()

    def shake_hands(self, ciphertext: bytes | memoryview) -> bool:
        """Whether the handshake is done with this. What comes after it is kept for `receive`.

        EncryptionError: the connection can't go on."""
        self._incoming.write(ciphertext)
        self.begun = True
        return self._shake_hands()

    def receive(self, ciphertext: bytes | memoryview) -> bytes:
        """What was said in it, and in what came before; nothing while a message is not whole.

        EncryptionError: the connection can't go on."""
        incoming = self._incoming
        if self.ready:
            incoming.write(ciphertext)
        elif not self.shake_hands(ciphertext):
            return b""
        try:
            data = self._tls.read(_RECORD_BYTES)
            if not incoming.pending:
                if not data:
                    self.finished = True
                return data
            pieces = [data]
            # Asking once more after the last whole record costs an exception; a part of one is rare.
            while data and incoming.pending:
                try:
                    data = self._tls.read(_RECORD_BYTES)
                except ssl.SSLWantReadError:
                    break
                pieces.append(data)
        except ssl.SSLZeroReturnError:  # both have said that they end
            self.finished = True
            return b""
        except ssl.SSLWantReadError:
            if self._outgoing.pending > limits.TLS_ANSWERS_BYTES:
                raise EncryptionError("the other end wants answers only, and sends nothing else") from None
            return b""
        except ssl.SSLError as problem:
            raise self._broken(problem) from problem
        if not data:
            self.finished = True
        return b"".join(pieces)

    def receive_into(self, ciphertext: memoryview, buffer: memoryview) -> int:
        """As `receive`, with as much as there is room for in *buffer*; call it again with nothing new for the
        rest. How many bytes there are: 0 also at the end. To be called when ready only."""
        if ciphertext:
            self._incoming.write(ciphertext)
        count = 0
        if not self._incoming.pending and not self._tls.pending():
            return 0
        try:
            while count < len(buffer):
                read = self._tls.read(len(buffer) - count, buffer[count:])
                if not read:
                    self.finished = True
                    break
                count += int(read)
                if not self._incoming.pending and not self._tls.pending():
                    break
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as problem:
            if not count:
                raise self._broken(problem) from problem
        return count

    def send(self, plaintext: bytes | memoryview) -> None:
        """Encrypt it for `output`. To be called when ready only. EncryptionError."""
        if plaintext:
            try:
                self._tls.write(plaintext)
            except ssl.SSLError as problem:
                raise self._broken(problem) from problem

    def output(self) -> bytes:
        """What is to be sent now."""
        return self._outgoing.read()

    @property
    def has_output(self) -> bool:
        """Whether there is something to be sent."""
        return self._outgoing.pending > 0

    def close(self) -> None:
        """Say that nothing more will come from this end."""
        # It would wait for the other end's word, which is not waited for; or it was never ready.
        with contextlib.suppress(OSError, ValueError):
            self._tls.unwrap()

    def release(self) -> None:
        """Give OpenSSL's memory back, some 50 KB: nothing else may be called any more.

        Whoever has this object may be in a cycle of references, and stay for long."""
        del self._tls, self._incoming, self._outgoing

    @property
    def certificate(self) -> bytes | None:
        """The other end's, in DER, verified; None if it has shown none. To be asked when ready only."""
        return self._tls.getpeercert(binary_form=True) or None

    @property
    def session(self) -> ssl.SSLSession | None:
        """What makes another connection to the same server cheaper, once the server has said something."""
        session = self._tls.session
        return session if session is not None and session.has_ticket else None

    @property
    def resumed(self) -> bool:
        """Whether a session made this connection cheaper."""
        return bool(self._tls.session_reused)

    @property
    def version(self) -> str:
        """Such as "TLSv1.3"."""
        return self._tls.version() or ""

    def _shake_hands(self) -> bool:
        """Whether the handshake is done."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as problem:
            raise self._broken(problem) from problem
        except ssl.CertificateError as problem:  # a name that the module ssl does not let through
            raise EncryptionError(str(problem)) from problem
        self.ready = True
        return True

    def _broken(self, problem: ssl.SSLError) -> EncryptionError:
        self.met_other_name = is_other_name(problem)
        return EncryptionError(
            in_words(problem, server_side=self._server_side, server_hostname=self._server_hostname)
        )
