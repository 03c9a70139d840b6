"""Who is answered: the page itself, in a browser on this machine; no other site, and no name that leads here."""

import re

OWN_HOST = re.compile(r"(?:127\.0\.0\.1|localhost)(?::\d{1,5})?", re.ASCII)  # any port: ssh may have passed it on from another
HEADERS = {  # of every answer
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
                               "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin", "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


class Refusal(Exception):
    """A request that is not carried out: `word` names what the page says of it in its table of words."""

    def __init__(self, word, status=400, **details):
        super().__init__(word)
        self.word, self.status, self.details = word, status, details


def check_request(method, path, headers):
    """Refusal unless a request is the page's own.

    A name of another site that was made to lead to 127.0.0.1 shows in Host; another site's page in Origin or Sec-Fetch-Site,
    which its scripts cannot change. Whatever changes something must say that it comes from the page.
    """
    host, origin = headers.get("Host", ""), headers.get("Origin")
    if len(headers.get_all("Host", [])) != 1 or not OWN_HOST.fullmatch(host):
        raise Refusal("other_host", 403)
    if origin is not None and origin != f"http://{host}" or origin is None and method != "GET":
        raise Refusal("other_origin", 403)
    if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and path != "/":  # a link may lead to the page
        raise Refusal("other_origin", 403)
