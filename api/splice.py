"""A resource as it is read: as received, with id and meta put in. No other value is decoded and encoded again."""

from __future__ import annotations

import msgspec

from schema.resources import StoredVersion

_Object = dict[str, msgspec.Raw]
_decode_object = msgspec.json.Decoder(_Object).decode


def instant(version: StoredVersion) -> str:
    """`meta.lastUpdated`: a FHIR instant in UTC."""
    return version.last_updated.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def spliced(version: StoredVersion) -> msgspec.Raw:
    """The resource with `id`, `meta.versionId` and `meta.lastUpdated`; `version` is not a deletion."""
    assert version.body is not None
    resource = _decode_object(version.body)
    meta = _meta(resource)
    meta["versionId"] = _raw(str(version.version))
    meta["lastUpdated"] = _raw(instant(version))
    first = {name: resource.pop(name) for name in ("resourceType",) if name in resource}
    first["id"] = _raw(version.resource_id)
    first["meta"] = _raw(meta)
    return _raw({**first, **{name: value for name, value in resource.items() if name not in ("id", "meta")}})


def _meta(resource: _Object) -> _Object:
    """The resource's meta; an empty one where there is none, or what stands there is no object."""
    try:
        return _decode_object(resource["meta"])
    except (KeyError, msgspec.ValidationError):
        return {}


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
