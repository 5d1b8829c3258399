"""Why a TLS connection can't be, in plain words: OpenSSL's own reasons, and what they mean here.

Owns the words only. `{they}` is the other end, `{we}` this one; the words follow "refused: " in a server's
log and "no TLS: " in a client's message.
"""

import ssl

#: What our side found in the other's certificate, by the numbers of X509_STORE_CTX_get_error(3).
_VERIFICATION = {
    3: "the file of revoked certificates has no list of the authority that signed {their} certificate",
    9: "{their} certificate is not valid yet, or a clock is wrong",
    10: "{their} certificate has expired",
    12: "the file of revoked certificates has expired: make a new one",
    23: "{their} certificate was revoked",
    26: "{their} certificate is for another purpose",
}
#: It was signed by nobody whom we trust.
_UNTRUSTED = (2, 18, 19, 20, 21)
#: Verification found another host name, or another IP address, than was asked for.
_OTHER_NAME = (62, 64)

#: What our side can't go on with, and what the other end says of us (its alerts), by OpenSSL's names.
_REASONS = {
    "WRONG_VERSION_NUMBER": "{they} speaks no TLS",
    "HTTP_REQUEST": "{they} speaks HTTP, and no TLS",
    "HTTPS_PROXY_REQUEST": "{they} speaks HTTP, and no TLS",
    "UNKNOWN_PROTOCOL": "{they} speaks no TLS",
    "BAD_PACKET_LENGTH": "{they} speaks no TLS",
    "PACKET_LENGTH_TOO_LONG": "{they} speaks no TLS",
    "BAD_RECORD_TYPE": "{they} speaks no TLS",
    "RECORD_LAYER_FAILURE": "{they} speaks no TLS",
    "UNSUPPORTED_PROTOCOL": "{they} speaks only TLS that is older than 1.2",
    "VERSION_TOO_LOW": "{they} speaks only TLS that is older than 1.2",
    "TLSV1_ALERT_PROTOCOL_VERSION": "{they} speaks another version of TLS",
    "NO_SHARED_CIPHER": "{they} knows no cipher that {we} would take",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "{they} shows no certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "{they} wants a certificate of {us}",
    "TLSV1_ALERT_UNKNOWN_CA": "{they} does not trust the authority that signed {our} certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "{they} says that {our} certificate has expired",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "{they} says that {our} certificate was revoked",
    "SSLV3_ALERT_BAD_CERTIFICATE": "{they} does not accept {our} certificate, or the name in it",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "{they} does not accept {our} kind of certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "{they} does not accept {our} certificate",
    "TLSV1_ALERT_ACCESS_DENIED": "{they} does not let {us} in",
    # Of TLS 1.2, whose servers have no better word for "no certificate", nor for "no cipher".
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "{they} refused: it wants a certificate, or another cipher",
    "TLSV1_ALERT_INTERNAL_ERROR": "{they} has met a fault of its own",
    "UNEXPECTED_EOF_WHILE_READING": "{they} broke off",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC": "what comes from {them} was changed on the way",
    "BAD_DECRYPT": "what comes from {them} was changed on the way",
}
_OF_A_SERVER = {
    "they": "the client", "them": "the client", "their": "the client's",
    "we": "this server", "us": "this server", "our": "this server's",
}  # fmt: skip
_OF_A_CLIENT = {
    "they": "the server", "them": "the server", "their": "the server's",
    "we": "this client", "us": "this client", "our": "this client's",
}  # fmt: skip


def is_other_name(problem: ssl.SSLError) -> bool:
    """Whether all is well with the certificate, but it is that of another host."""
    return getattr(problem, "verify_code", 0) in _OTHER_NAME


def in_words(problem: ssl.SSLError, *, server_side: bool, server_hostname: str | None = None) -> str:
    """What went wrong, for people. *server_hostname*: whom a client expected there."""
    words = _OF_A_SERVER if server_side else _OF_A_CLIENT
    code = getattr(problem, "verify_code", 0)
    if is_other_name(problem):
        return f"the server's certificate is not for {server_hostname!r}"
    if code in _UNTRUSTED:
        return "{their} certificate was signed by no authority that {we} trusts".format(**words)
    reason = _VERIFICATION.get(code) or _REASONS.get(problem.reason or "")
    if reason is not None:
        return reason.format(**words)
    if code:
        return f"{words['their']} certificate is not good: {getattr(problem, 'verify_message', code)}"
    named = (problem.reason or str(problem)).lower().replace("_", " ")
    return f"TLS with {words['them']} failed: {named}"
