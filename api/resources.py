"""Reading what is stored: read, vread, history (FHIR R4 "RESTful API")."""

from __future__ import annotations

from email.utils import format_datetime
from typing import Any

from fastapi import APIRouter, Query, Response

from api.context import InContext
from api.errors import FHIR_JSON, Refusal, json_response
from api.splice import instant, spliced
from schema import resources
from schema.fhir_types import ID, TYPE_NUMBERS
from schema.resources import Op, StoredVersion

READ = ["GET", "HEAD"]

router = APIRouter()


@router.api_route("/{resource_type}/{resource_id}", methods=READ)
def read(resource_type: str, resource_id: str, context: InContext) -> Response:
    """What stands under the id; 410 after a deletion."""
    return _resource(resource_type, resource_id, context, None)


@router.api_route("/{resource_type}/{resource_id}/_history/{version}", methods=READ)
def vread(resource_type: str, resource_id: str, version: int, context: InContext) -> Response:
    """One version; 410 where it is a deletion."""
    return _resource(resource_type, resource_id, context, version)


@router.api_route("/{resource_type}/{resource_id}/_history", methods=READ)
def history(
    resource_type: str,
    resource_id: str,
    context: InContext,
    count: int = Query(50, alias="_count", ge=1, le=1000),
    before: int | None = Query(None, ge=1),
) -> Response:
    """The resource's versions, newest first, `_count` to a page."""
    _check(resource_type, resource_id)
    with context.engine.begin() as connection:
        tenant_id = context.tenant_id(connection)
        versions = resources.history(connection, tenant_id, resource_type, resource_id, before=before, limit=count + 1)
    if not versions and before is None:
        raise Refusal(404, f"{resource_type}/{resource_id} is not known")
    url = f"{context.base}/{resource_type}/{resource_id}"
    bundle: dict[str, Any] = {"resourceType": "Bundle", "type": "history"}
    if len(versions) > count:
        next_url = f"{url}/_history?_count={count}&before={versions[count - 1].version}"
        bundle["link"] = [{"relation": "next", "url": next_url}]
    bundle["entry"] = [_entry(version, resource_type, url) for version in versions[:count]]
    return json_response(bundle)


def _entry(version: StoredVersion, resource_type: str, url: str) -> dict[str, Any]:
    method, status = {
        Op.CREATE: ("PUT", "201"),
        Op.DELETE: ("DELETE", "204"),
    }.get(version.op, ("PUT", "200"))
    entry: dict[str, Any] = {"fullUrl": url}
    if version.body is not None:
        entry["resource"] = spliced(version)
    entry["request"] = {"method": method, "url": f"{resource_type}/{version.resource_id}"}
    entry["response"] = {"status": status, "etag": f'W/"{version.version}"', "lastModified": instant(version)}
    return entry


def _resource(resource_type: str, resource_id: str, context: InContext, version: int | None) -> Response:
    _check(resource_type, resource_id)
    with context.engine.begin() as connection:
        tenant_id = context.tenant_id(connection)
        stored = resources.read(connection, tenant_id, resource_type, resource_id, version)
    if stored is None:
        raise Refusal(
            404, f"{resource_type}/{resource_id} is not known" + ("" if version is None else " in that version")
        )
    if stored.body is None:
        raise Refusal(410, f"{resource_type}/{resource_id} was deleted")
    headers = {
        "ETag": f'W/"{stored.version}"',
        "Last-Modified": format_datetime(stored.last_updated, usegmt=True),
    }
    return Response(bytes(spliced(stored)), headers=headers, media_type=FHIR_JSON)


def _check(resource_type: str, resource_id: str) -> None:
    if resource_type not in TYPE_NUMBERS:
        raise Refusal(404, "there is no such resource type")
    if not ID.fullmatch(resource_id):
        raise Refusal(404, "that is not an id")
