"""FHIR `Parameters` of $bulk-submit and $bulk-submit-status, read strictly, with every fault found at once.

Source: Bulk Data Access 4.0.0-ballot, OperationDefinitions bulk-submit and bulk-submit-status. What earlier drafts of
it called otherwise is accepted with a warning: `FHIRBaseUrl`, `fileRequestHeaders`, `complete`, `aborted`, URLs as
strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard
from urllib.parse import urlsplit

from submit_tasks.outcomes import Issue
from workers.fetch.egress import check_header, check_url
from workers.fetch.errors import Refused

EVENT_STATUS = "http://hl7.org/fhir/event-status"
STATUS_SYSTEMS = {EVENT_STATUS, "http://hl7.org/fhir/uv/bulkdata/ValueSet/submission-status", None}
STATUSES = {
    "in-progress": "in-progress",
    "completed": "completed",
    "stopped": "stopped",
    "complete": "completed",
    "aborted": "stopped",
}
NDJSON_FORMATS = {"application/fhir+ndjson", "application/ndjson", "ndjson"}
FHIR_VERSIONS = {"4.0", "4.3", "5.0"}
MAX_TEXT = 256
MAX_URL = 2048  # the manifest's is part of a key in the database
MAX_VALUE = 16_384
MAX_ISSUES = 100
SECRET_MEMBERS = frozenset({"headers", "file_encryption_key", "manifest_url"})

_NOT_STORED = re.compile("[\0\ud800-\udfff]")
_FHIR_VERSION = re.compile(r";\s*fhirVersion=([0-9.]+)\s*$", re.IGNORECASE)


class InvalidRequest(Exception):  # noqa: N818
    """The request is not what the operation takes; the submitter mends it. `issues` name every fault and its place."""

    status = 400

    def __init__(self, issues: Sequence[Issue]) -> None:
        super().__init__("; ".join(issue.text for issue in issues))
        self.issues = list(issues)


@dataclass(frozen=True, slots=True)
class KickoffRequest:
    """One $bulk-submit. `status` is None where the request names none. Header values and keys stay out of `repr`."""

    system: str
    value: str
    submission_id: str
    status: str | None
    manifest_url: str | None
    replaces_manifest_url: str | None
    fhir_base_url: str | None
    output_format: str | None
    fhir_version: str | None
    headers: list[tuple[str, str]] = field(repr=False)
    oauth_metadata_urls: list[str]
    file_encryption_key: dict[str, Any] | None = field(repr=False)
    metadata: list[dict[str, str]]
    import_directives: list[dict[str, str]]
    warnings: list[Issue]


@dataclass(frozen=True, slots=True)
class StatusRequest:
    """One $bulk-submit-status."""

    system: str
    value: str
    submission_id: str
    warnings: list[Issue]


@dataclass(frozen=True, slots=True)
class _Named:
    """A parameter as it stands in the request, and where."""

    body: dict[str, Any]
    place: str


Reading = Callable[["_Parameters", _Named], Any]


class _Parameters:
    """Reads one Parameters resource, collecting what is wrong with it."""

    def __init__(self, body: Any, known: dict[str, tuple[bool, Reading]], aliases: dict[str, str]) -> None:
        self.issues: list[Issue] = []
        self.warnings: list[Issue] = []
        self._values: dict[str, list[Any]] = {name: [] for name in known}
        self._given: set[str] = set()
        self.readable = False
        if not isinstance(body, dict):
            self.fault("the body is not a JSON object", "Parameters")
        elif body.get("resourceType") != "Parameters":
            self.fault("the body is not a Parameters resource", "Parameters.resourceType")
        elif not isinstance(body.get("parameter", []), list):
            self.fault("parameter is not an array", "Parameters.parameter")
        else:
            self.readable = True
            for index, parameter in enumerate(body.get("parameter", [])):
                self.take(parameter, f"Parameters.parameter[{index}]", known, aliases)

    def take(self, parameter: Any, place: str, known: dict[str, tuple[bool, Reading]], aliases: dict[str, str]) -> None:
        """Read one parameter, which stands at `place`."""
        name = parameter.get("name") if isinstance(parameter, dict) else None
        if not isinstance(name, str):
            self.fault("the parameter has no name", f"{place}.name")
            return
        if name in aliases:
            self.warn(f"{name} is accepted for {aliases[name]}", f"{place}.name")
            name = aliases[name]
        if name not in known:
            self.fault(f"the parameter {name[:64]!r} is not known here", f"{place}.name", code="not-supported")
            return
        repeats, reading = known[name]
        if name in self._given and not repeats:
            self.fault(f"{name} may be given once only", place)
        self._given.add(name)
        value = reading(self, _Named(parameter, place))
        if value is not None:
            self._values[name].append(value)

    def fault(self, text: str, place: str, *, code: str = "invalid") -> None:
        if len(self.issues) < MAX_ISSUES:
            self.issues.append(Issue("error", code, text, expression=[place]))
        elif len(self.issues) == MAX_ISSUES:
            self.issues.append(Issue("error", "too-costly", "there are more faults than are told here"))

    def warn(self, text: str, place: str) -> None:
        if len(self.warnings) < MAX_ISSUES:
            self.warnings.append(Issue("warning", "informational", text, expression=[place]))

    def one(self, name: str) -> Any:
        values = self._values[name]
        return values[0] if values else None

    def require(self, *names: str, because: str = "is missing") -> None:
        """A fault unless one of `names` is given; one that is given and wrong has its own."""
        if not self._given.intersection(names):
            self.fault(f"{' or '.join(names)} {because}", "Parameters.parameter", code="required")

    def given(self, name: str) -> bool:
        return name in self._given

    def all(self, name: str) -> list[Any]:
        return self._values[name]

    def text(self, named: _Named, kinds: Sequence[str], longest: int) -> str | None:
        """A non-empty string, `longest` in bytes, under the first of `kinds`; the others are taken with a warning."""
        found = [key for key in named.body if key.startswith("value")]
        if len(found) != 1 or found[0] not in kinds:
            self.fault(f"{named.body['name']} takes one {kinds[0]}", named.place)
            return None
        value = named.body[found[0]]
        place = f"{named.place}.{found[0]}"
        if not _is_text(value):
            self.fault(f"{named.body['name']} is not a text", place)
            return None
        if len(value.encode()) > longest:
            self.fault(f"{named.body['name']} is longer than {longest} bytes", place)
            return None
        if found[0] != kinds[0]:
            self.warn(f"{found[0]} is accepted for {kinds[0]}", place)
        return value

    def parts(self, named: _Named, names: Sequence[str]) -> dict[str, _Named] | None:
        """The parameter's parts by name; those not in `names`, or given twice, are faults."""
        found: dict[str, _Named] = {}
        parts = named.body.get("part")
        if not isinstance(parts, list):
            self.fault(f"{named.body['name']} takes parts", named.place)
            return None
        for index, part in enumerate(parts):
            place = f"{named.place}.part[{index}]"
            name = part.get("name") if isinstance(part, dict) else None
            if not isinstance(name, str) or name not in names or name in found:
                self.fault(f"{named.body['name']} takes one part each of {', '.join(names)}", place)
                return None
            found[name] = _Named(part, place)
        return found


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether it is a string that says something and can be stored: no NUL, no half of a surrogate pair."""
    return isinstance(value, str) and bool(value.strip()) and not _NOT_STORED.search(value)


def _string(reader: _Parameters, named: _Named) -> str | None:
    return reader.text(named, ["valueString"], MAX_TEXT)


def _url(reader: _Parameters, named: _Named) -> str | None:
    url = reader.text(named, ["valueUrl", "valueUri", "valueString"], MAX_URL)
    if url is None:
        return None
    try:
        return check_url(url)
    except Refused as refused:
        reader.fault(f"{named.body['name']}: {refused.reason}", named.place)
        return None


def _identifier(reader: _Parameters, named: _Named) -> tuple[str, str] | None:
    identifier = named.body.get("valueIdentifier")
    values = [identifier.get(key) for key in ("system", "value")] if isinstance(identifier, dict) else []
    texts = [value for value in values if _is_text(value) and len(value.encode()) <= MAX_URL]
    if len(texts) != 2:
        reader.fault("submitter takes a valueIdentifier with system and value", named.place)
        return None
    return texts[0], texts[1]


def _status(reader: _Parameters, named: _Named) -> str | None:
    coding = named.body.get("valueCoding")
    place = f"{named.place}.valueCoding"
    if not isinstance(coding, dict):
        reader.fault("submissionStatus takes a valueCoding", named.place)
        return None
    system, code = coding.get("system"), coding.get("code")
    if not isinstance(code, str) or code not in STATUSES:
        reader.fault("submissionStatus is one of in-progress, completed, stopped", f"{place}.code", code="code-invalid")
        return None
    if not isinstance(system, str | None) or system not in STATUS_SYSTEMS:
        reader.fault(f"submissionStatus is a code of {EVENT_STATUS}", f"{place}.system", code="code-invalid")
        return None
    if system != EVENT_STATUS:
        reader.warn(f"the system of submissionStatus is {EVENT_STATUS}", f"{place}.system")
    if STATUSES[code] != code:
        reader.warn(f"{code} is accepted for {STATUSES[code]}", f"{place}.code")
    return STATUSES[code]


def _headers(reader: _Parameters, named: _Named) -> list[tuple[str, str]] | None:
    """One header; or, as some earlier providers send them, all names and then all values in one parameter."""
    parts = named.body.get("part")
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        reader.fault("fileRequestHeader takes the parts headerName and headerValue", named.place)
        return None
    names, values = (
        [
            reader.text(_Named(part, f"{named.place}.part[{index}]"), ["valueString"], MAX_VALUE)
            for index, part in enumerate(parts)
            if part.get("name") == part_name
        ]
        for part_name in ("headerName", "headerValue")
    )
    if not names or len(names) != len(values) or len(names) + len(values) != len(parts):
        reader.fault("fileRequestHeader takes the parts headerName and headerValue", named.place)
        return None
    headers = []
    for name, value in zip(names, values, strict=True):
        if name is None or value is None:
            return None
        try:
            headers.append(check_header(name, value))
        except Refused as refused:
            reader.fault(refused.reason, named.place)
            return None
    return headers


def _output_format(reader: _Parameters, named: _Named) -> tuple[str, str | None] | None:
    value = reader.text(named, ["valueString"], MAX_TEXT)
    if value is None:
        return None
    version = _FHIR_VERSION.search(value)
    media_type = _FHIR_VERSION.sub("", value).strip().lower()
    if media_type not in NDJSON_FORMATS:
        reader.fault(f"the format {media_type[:64]!r} is not NDJSON", named.place, code="not-supported")
        return None
    if version and version[1] not in FHIR_VERSIONS:
        reader.fault(f"FHIR version {version[1]} is not supported", named.place, code="not-supported")
        return None
    return value, version[1] if version else None


def _file_encryption_key(reader: _Parameters, named: _Named) -> dict[str, Any] | None:
    parts = reader.parts(named, ["coding", "value"])
    if parts is None:
        return None
    if "value" not in parts:
        reader.fault("fileEncryptionKey has no value", named.place, code="required")
        return None
    value = reader.text(parts["value"], ["valueString"], MAX_VALUE)
    coding = _coding(reader, parts["coding"]) if "coding" in parts else None
    return None if value is None else {"value": value, "coding": coding}


def _coding(reader: _Parameters, named: _Named) -> dict[str, str] | None:
    """A Coding's system, if it has one, and code."""
    coding = named.body.get("valueCoding")
    found = {key: coding[key] for key in ("system", "code") if key in coding} if isinstance(coding, dict) else {}
    if "code" not in found or not all(_is_text(value) and len(value.encode()) <= MAX_URL for value in found.values()):
        reader.fault("coding takes a valueCoding with a code", named.place)
        return None
    return found


def _directive(reader: _Parameters, named: _Named) -> dict[str, str] | None:
    """parameterUrl with parameterValue; or, as the OperationDefinition's prose has it, one part named by a URL."""
    parts = named.body.get("part")
    if isinstance(parts, list) and len(parts) == 1 and isinstance(parts[0], dict):
        name = parts[0].get("name")
        if _is_text(name) and len(name.encode()) <= MAX_URL and _scheme(name):
            value = reader.text(_Named(parts[0], f"{named.place}.part[0]"), ["valueString", "valueUri"], MAX_VALUE)
            return None if value is None else {"parameterUrl": name, "parameterValue": value}
    found = reader.parts(named, ["parameterUrl", "parameterValue"])
    if found is None:
        return None
    if len(found) != 2:
        reader.fault(f"{named.body['name']} takes parameterUrl and parameterValue", named.place, code="required")
        return None
    url = reader.text(found["parameterUrl"], ["valueUri", "valueUrl", "valueString"], MAX_URL)
    value = reader.text(found["parameterValue"], ["valueString"], MAX_VALUE)
    if url is None or value is None:
        return None
    if not _scheme(url):
        reader.fault("parameterUrl is not an absolute URL", found["parameterUrl"].place)
        return None
    return {"parameterUrl": url, "parameterValue": value}


def _in_the_clear(reader: _Parameters, named: _Named) -> None:
    reader.fault(
        f"{named.body['name']} may not be sent in the clear over the broker: send it encrypted, as secrets",
        named.place,
        code="security",
    )


def _scheme(url: str) -> str:
    """The URL's scheme, empty where it has none or is none."""
    try:
        return urlsplit(url).scheme
    except ValueError:
        return ""


_KICKOFF: dict[str, tuple[bool, Reading]] = {
    "submitter": (False, _identifier),
    "submissionId": (False, _string),
    "submissionStatus": (False, _status),
    "manifestUrl": (False, _url),
    "replacesManifestUrl": (False, _url),
    "outputFormat": (False, _output_format),
    "fhirBaseUrl": (False, _url),
    "fileRequestHeader": (True, _headers),
    "oauthMetadataUrl": (True, _url),
    "fileEncryptionKey": (False, _file_encryption_key),
    "metadata": (True, _directive),
    "import": (True, _directive),
}
_KICKOFF_ALIASES = {"FHIRBaseUrl": "fhirBaseUrl", "fileRequestHeaders": "fileRequestHeader"}
_KICKOFF_IN_THE_CLEAR: dict[str, tuple[bool, Reading]] = {
    **_KICKOFF,
    "fileRequestHeader": (True, _in_the_clear),
    "fileEncryptionKey": (True, _in_the_clear),
}
_STATUS: dict[str, tuple[bool, Reading]] = {
    "submitter": (False, _identifier),
    "submissionId": (False, _string),
    "_outputFormat": (False, _output_format),
}


def parse_kickoff(body: Any) -> KickoffRequest:
    """Read the Parameters of $bulk-submit (any JSON value); raises `InvalidRequest`."""
    return _kickoff_request(_Parameters(body, _KICKOFF, _KICKOFF_ALIASES))


def parse_kickoff_message(body: Any, secrets: Any) -> KickoffRequest:
    """Read the Parameters of a $bulk-submit that came over the broker; raises `InvalidRequest`.

    Others may read such a message: a secret among its parameters is a fault. `secrets` is what came encrypted, None
    where nothing did: an object of `headers` (pairs of name and value), `file_encryption_key` (the parts `value` and
    `coding`, or a JWK), and `manifest_url`, the only one with which these secrets may be used.
    """
    reader = _Parameters(body, _KICKOFF_IN_THE_CLEAR, _KICKOFF_ALIASES)
    if secrets is not None:
        _take_secrets(reader, secrets)
    return _kickoff_request(reader)


def submission_named(body: Any) -> tuple[str, str, str] | None:
    """The submitter's system and value, and the submission id, whatever else is wrong; None if one is not legible."""
    reader = _Parameters(body, _KICKOFF, _KICKOFF_ALIASES)
    submitter, submission_id = reader.one("submitter"), reader.one("submissionId")
    return None if submitter is None or submission_id is None else (*submitter, submission_id)


def _take_secrets(reader: _Parameters, secrets: Any) -> None:
    """Read them as the parameters they would be over HTTP, with the same faults."""
    if not isinstance(secrets, dict) or not SECRET_MEMBERS.issuperset(secrets):
        reader.fault(f"the secrets are not an object of {', '.join(sorted(SECRET_MEMBERS))}", "secrets")
        return
    if "manifest_url" in secrets and secrets["manifest_url"] != reader.one("manifestUrl"):
        reader.fault("the secrets were encrypted for another manifestUrl", "secrets.manifest_url", code="security")
    headers = secrets.get("headers", [])
    if not isinstance(headers, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in headers):
        reader.fault("headers takes pairs of a name and a value", "secrets.headers")
        headers = []
    for index, pair in enumerate(headers):
        names = ("headerName", "headerValue")
        part = [{"name": name, "valueString": text} for name, text in zip(names, pair, strict=True)]
        reader.take({"name": "fileRequestHeader", "part": part}, f"secrets.headers[{index}]", _KICKOFF, {})
    key = secrets.get("file_encryption_key")
    if key is None:
        return
    if not isinstance(key, dict):
        reader.fault("file_encryption_key is not an object", "secrets.file_encryption_key")
        return
    if "kty" in key:
        key = {"value": json.dumps(key)}
    kinds = {"value": "valueString", "coding": "valueCoding"}
    part = [{"name": name, kinds.get(name, "value"): value} for name, value in key.items() if value is not None]
    reader.take({"name": "fileEncryptionKey", "part": part}, "secrets.file_encryption_key", _KICKOFF, {})


def _kickoff_request(reader: _Parameters) -> KickoffRequest:
    if reader.readable:
        reader.require("submitter")
        reader.require("submissionId")
        reader.require("submissionStatus", "manifestUrl", because="is required")
        if reader.given("manifestUrl"):
            reader.require("fhirBaseUrl", because="is required with manifestUrl")
    if reader.issues:
        raise InvalidRequest(reader.issues)
    submitter = reader.one("submitter")
    output_format, fhir_version = reader.one("outputFormat") or (None, None)
    return KickoffRequest(
        system=submitter[0],
        value=submitter[1],
        submission_id=reader.one("submissionId"),
        status=reader.one("submissionStatus"),
        manifest_url=reader.one("manifestUrl"),
        replaces_manifest_url=reader.one("replacesManifestUrl"),
        fhir_base_url=reader.one("fhirBaseUrl"),
        output_format=output_format,
        fhir_version=fhir_version,
        headers=[header for headers in reader.all("fileRequestHeader") for header in headers],
        oauth_metadata_urls=reader.all("oauthMetadataUrl"),
        file_encryption_key=reader.one("fileEncryptionKey"),
        metadata=reader.all("metadata"),
        import_directives=reader.all("import"),
        warnings=reader.warnings,
    )


def parse_status(body: Any) -> StatusRequest:
    """Read the Parameters of $bulk-submit-status (any JSON value); raises `InvalidRequest`."""
    reader = _Parameters(body, _STATUS, {"outputFormat": "_outputFormat"})
    if reader.readable:
        reader.require("submitter")
        reader.require("submissionId")
    if reader.issues:
        raise InvalidRequest(reader.issues)
    submitter = reader.one("submitter")
    return StatusRequest(submitter[0], submitter[1], reader.one("submissionId"), reader.warnings)
