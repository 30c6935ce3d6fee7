"""Sample data: a Bulk Data export of FHIR R4 resources such as a clinic would make, the same for the same seed."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec

# Type and share of the resources, in an order in which each type refers only to those before it.
SHARES = {
    "Patient": 0.05,
    "Organization": 0.003,
    "Practitioner": 0.007,
    "Encounter": 0.10,
    "Observation": 0.50,
    "Condition": 0.08,
    "MedicationRequest": 0.08,
    "Procedure": 0.06,
    "Immunization": 0.06,
    "DiagnosticReport": 0.06,
}
EXPORTED_AT = "2026-01-05T04:30:00Z"
VISIT_DAYS = [(date(2019, 1, 1) + timedelta(days=number)).isoformat() for number in range(7 * 365)]
BIRTH_DAYS = [(date(1932, 1, 1) + timedelta(days=number)).isoformat() for number in range(67 * 365)]
LINES_AT_ONCE = 500

FAMILIES = ["Brown", "Çelik", "Dvořák", "García", "Haddad", "Müller", "Nguyễn", "Núñez", "O’Brien", "Sørensen"]
GIVEN = {
    "female": ["Ada", "Amélie", "Beatriz", "Freja", "Grace", "İpek", "Małgorzata", "Noor", "Sofía", "Zoë"],
    "male": ["Ángel", "Björn", "Daniel", "Émile", "Henry", "Jürgen", "Łukasz", "Mateo", "Søren", "Tomáš"],
}
PLACES = [
    ("Cañon City", "CO", "81212"),
    ("Española", "NM", "87532"),
    ("La Cañada Flintridge", "CA", "91011"),
    ("Madison", "WI", "53703"),
]
STREETS = ["Alder Street", "Birch Avenue", "Juniper Road", "Maple Court", "Willow Way"]
CLINICS = ["Community Hospital", "Family Medicine", "Health Center", "Internal Medicine Associates"]

# LOINC: code and display, then the UCUM unit, the reference range and the decimals of a value.
VITALS = [
    ("8867-4", "Heart rate", "/min", 60, 100, 0),
    ("9279-1", "Respiratory rate", "/min", 12, 20, 0),
    ("8310-5", "Body temperature", "Cel", 36.1, 37.8, 1),
    ("2708-6", "Oxygen saturation in Arterial blood", "%", 94, 99, 0),
    ("29463-7", "Body weight", "kg", 48, 110, 1),
]
LABS = [
    ("6690-2", "Leukocytes [#/volume] in Blood by Automated count", "10*3/uL", 4.5, 11, 1),
    ("718-7", "Hemoglobin [Mass/volume] in Blood", "g/dL", 12, 17.5, 1),
    ("777-3", "Platelets [#/volume] in Blood by Automated count", "10*3/uL", 150, 450, 0),
    ("2345-7", "Glucose [Mass/volume] in Serum or Plasma", "mg/dL", 70, 99, 0),
    ("2160-0", "Creatinine [Mass/volume] in Serum or Plasma", "mg/dL", 0.6, 1.3, 2),
    ("2823-3", "Potassium [Moles/volume] in Serum or Plasma", "mmol/L", 3.5, 5.1, 1),
    ("2093-3", "Cholesterol [Mass/volume] in Serum or Plasma", "mg/dL", 125, 200, 0),
    ("2571-8", "Triglyceride [Mass/volume] in Serum or Plasma", "mg/dL", 50, 150, 0),
    ("18262-6", "Cholesterol in LDL [Mass/volume] in Serum or Plasma by Direct assay", "mg/dL", 60, 130, 0),
]
# LOINC panels: of the first three LABS, of the next three and of the last.
PANELS = [
    ("58410-2", "CBC panel - Blood by Automated count"),
    ("24323-8", "Comprehensive metabolic 2000 panel - Serum or Plasma"),
    ("57698-3", "Lipid panel with direct LDL - Serum or Plasma"),
]
REMARKS = """
Specimen received in good condition, labelled, and within the time allowed for each test.
Quality control of the run was within its limits. Results outside their reference range are flagged L or H.
The ranges are those of this laboratory and hold for adults; results of another laboratory may not compare.
Hemolysis, lipemia and icterus were looked for and not found, where they would interfere with a test.
To be read together with the clinical findings; ask the laboratory before acting on a result that does not fit.
"""
VITAL_SIGN = {"category": "vital-signs", "group": "Vital Signs", "profile": "vital-signs"}
LAB = {"category": "laboratory", "group": "Laboratory", "profile": "observation-lab"}
FLAGS = {"L": "Low", "N": "Normal", "H": "High"}
# SNOMED CT; MEDICATIONS are RxNorm, VACCINES are CVX.
VISITS = [
    ("185349003", "Encounter for check up"),
    ("185345009", "Encounter for symptom"),
    ("390906007", "Follow-up encounter"),
]
CONDITIONS = [
    ("38341003", "Hypertensive disorder"),
    ("44054006", "Diabetes mellitus type 2"),
    ("195967001", "Asthma"),
    ("55822004", "Hyperlipidemia"),
    ("195662009", "Acute viral pharyngitis"),
]
PROCEDURES = [
    ("430193006", "Medication reconciliation"),
    ("171207006", "Depression screening"),
    ("5880005", "Physical examination procedure"),
    ("29303009", "Electrocardiographic procedure"),
]
MEDICATIONS = [
    ("314076", "lisinopril 10 MG Oral Tablet"),
    ("861007", "metformin hydrochloride 500 MG Oral Tablet"),
    ("617310", "atorvastatin 20 MG Oral Tablet"),
    ("197361", "amlodipine 5 MG Oral Tablet"),
]
VACCINES = [
    ("140", "Influenza, split virus, trivalent, PF"),
    ("115", "Tdap"),
    ("187", "zoster recombinant"),
    ("208", "COVID-19, mRNA, LNP-S, PF, 30 mcg/0.3 mL dose"),
]

SYSTEMS = {
    "bcp47": "urn:ietf:bcp:47",
    "cvx": "http://hl7.org/fhir/sid/cvx",
    "loinc": "http://loinc.org",
    "rxnorm": "http://www.nlm.nih.gov/research/umls/rxnorm",
    "sct": "http://snomed.info/sct",
}
CONCEPT = re.compile(r"<([^|<>]+)\|([^|<>]+)\|([^|<>]+)>")
SUBJECT_AND_ENCOUNTER = '"subject":{"reference":"Patient/%s"},"encounter":{"reference":"Encounter/%s"}'

Draw = Callable[[], float]
Maker = Callable[["_Clinic", int, Draw], str]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class SampleFile:
    """One NDJSON file. `size` is in bytes; `sha256` is of the file as it is before any compression, in hex."""

    name: str
    type: str
    lines: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SampleSet:
    """The files of a directory, in the order of its manifest."""

    directory: Path
    files: list[SampleFile]


def generate(
    directory: Path, resources: int, *, seed: int = 1, lines_per_file: int = 10_000, gzip_every: int = 0
) -> SampleSet:
    """Write that many resources into `Patient-1.ndjson` and so on, and a `manifest.json` that lists the files.

    Every reference leads to a resource of the set. Every `gzip_every`-th file has a compressed copy, `NAME.gz`, beside
    it; 0: none has. Raises ValueError for less than one resource or line.
    """
    if resources < 1 or lines_per_file < 1:
        raise ValueError("resources and lines_per_file must be at least 1")
    clinic = _Clinic(str(seed), _counts(resources))
    files: list[SampleFile] = []
    for kind, count in clinic.counts.items():
        lines = clinic.lines(kind)
        for number, start in enumerate(range(0, count, lines_per_file), 1):
            file_lines = min(lines_per_file, count - start)
            compress = gzip_every > 0 and (len(files) + 1) % gzip_every == 0
            path = directory / f"{kind}-{number}.ndjson"
            size, sha256 = _write(path, islice(lines, file_lines), compress=compress)
            files.append(SampleFile(path.name, kind, file_lines, size, sha256))
    manifest = {
        "transactionTime": EXPORTED_AT,
        "request": "https://ehr.example.org/fhir/$export",
        "requiresAccessToken": False,
        "output": [{"type": file.type, "url": file.name, "count": file.lines} for file in files],
        "deleted": [],
        "error": [],
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return SampleSet(directory, files)


def bad_lines(directory: Path, name: str, *, good: int, seed: int) -> dict[int, str]:
    """Write a file of Patients with that many good lines and, anywhere among them, one with each fault of `FAULTS`.

    Returns the faults by line number, from 1. No id is one that `generate` gives.
    """
    total = good + len(FAULTS)
    lines = [line.encode() for line in _Clinic(f"bad {seed}", {"Patient": total}).lines("Patient")]
    places = random.Random(seed).sample(range(total), len(FAULTS))
    faults = dict(zip(places, FAULTS, strict=True))
    for place, fault in faults.items():
        lines[place] = FAULTS[fault](lines[place])
    (directory / name).write_bytes(b"".join(line + b"\n" for line in lines))
    return {place + 1: faults[place] for place in sorted(faults)}


def expected_store(directory: Path, names: Iterable[str]) -> Iterator[tuple[str, str, bytes]]:
    """Type, id and body of every line of the named files: the bytes of the line without its line end."""
    decode = msgspec.json.Decoder(_Head).decode
    for name in names:
        with (directory / name).open("rb") as lines:
            for line in lines:
                head = decode(line)
                yield head.resource_type, head.id, line.removesuffix(b"\n")


class _Head(msgspec.Struct, rename="camel"):
    resource_type: str
    id: str


def _write(path: Path, lines: Iterator[str], *, compress: bool) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    with ExitStack() as stack:
        outputs: list[Any] = [stack.enter_context(path.open("wb"))]
        if compress:
            packed = stack.enter_context(path.with_name(f"{path.name}.gz").open("wb"))
            outputs.append(stack.enter_context(gzip.GzipFile("", "wb", 6, packed, mtime=0)))
        while some := list(islice(lines, LINES_AT_ONCE)):
            data = ("\n".join(some) + "\n").encode()
            size += len(data)
            digest.update(data)
            for output in outputs:
                output.write(data)
    return size, digest.hexdigest()


def _counts(resources: int) -> dict[str, int]:
    """How many of each type: one at least, as far as they go, and Observations for what rounding leaves."""
    if resources <= len(SHARES):
        return dict.fromkeys(islice(SHARES, resources), 1)
    counts = {kind: 1 + int((resources - len(SHARES)) * share) for kind, share in SHARES.items()}
    counts["Observation"] += resources - sum(counts.values())
    return counts


class _Clinic:
    """Who was seen by whom, where and when: computed from the seed and a resource's number, so that nothing is kept."""

    def __init__(self, seed: str, counts: dict[str, int]) -> None:
        self.counts = counts
        self._seed = seed
        self._hashes = {kind: hashlib.blake2b(f"{seed}/{kind}/".encode(), digest_size=16) for kind in counts}
        self.visit = lru_cache(maxsize=16)(self._visit)

    def lines(self, kind: str) -> Iterator[str]:
        """Every resource of the type."""
        make, draw = MAKERS[kind], random.Random(f"{self._seed}/{kind}").random
        return (make(self, number, draw) for number in range(self.counts[kind]))

    def id_of(self, kind: str, number: int) -> str:
        """The same for the same seed, type and number."""
        state = self._hashes[kind].copy()
        state.update(b"%d" % number)
        digits = state.hexdigest()
        return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"

    def visit_of(self, kind: str, number: int) -> dict[str, Any]:
        """The visit that a resource comes from; the resources of a type are spread evenly over the visits."""
        return self.visit(number * self.counts["Encounter"] // self.counts[kind])

    def first_of(self, kind: str, visit: int) -> int:
        """The number of the first resource of the type that comes from this visit or a later one."""
        return -(-visit * self.counts[kind] // self.counts["Encounter"])

    def _visit(self, number: int) -> dict[str, Any]:
        """What the templates say of a visit."""
        encounter = self.id_of("Encounter", number)
        chance = int(encounter[:8], 16)
        practitioner = chance % self.counts["Practitioner"]
        day, hour = VISIT_DAYS[chance % len(VISIT_DAYS)], 8 + chance // 7 % 9
        patient = self.id_of("Patient", number * self.counts["Patient"] // self.counts["Encounter"])
        return {
            "number": number,
            "visit": SUBJECT_AND_ENCOUNTER % (patient, encounter),
            "patient": patient,
            "encounter": encounter,
            "practitioner": self.id_of("Practitioner", practitioner),
            "organization": self.id_of("Organization", practitioner % self.counts["Organization"]),
            "start": f"{day}T{hour:02}:{chance % 4 * 15:02}:00Z",
            "end": f"{day}T{hour + 1:02}:{chance % 60:02}:00Z",
        }


def _template(kind: str, profile: str, narrative: str, elements: str) -> str:
    """For the operator %: a line of JSON, with what every resource has first. `<system|code|display>` is a concept."""
    lines = f"""
        {{"resourceType":"{kind}","id":"%(id)s","meta":{{"versionId":"1","lastUpdated":"%(end)s",
        "profile":["http://hl7.org/fhir/us/core/StructureDefinition/us-core-{profile}"]}},
        "text":{{"status":"generated","div":"<div xmlns=\\"http://www.w3.org/1999/xhtml\\"><p>{narrative}</p></div>"}},
        {elements}}}"""
    return CONCEPT.sub(_concept, "".join(line.strip() for line in lines.splitlines()))


def _concept(match: re.Match[str]) -> str:
    system, code, display = match.groups()
    url = SYSTEMS.get(system, f"http://terminology.hl7.org/CodeSystem/{system}")
    return f'{{"coding":[{{"system":"{url}","code":"{code}","display":"{display}"}}],"text":"{display}"}}'


PATIENT = _template(
    "Patient",
    "patient",
    "<b>%(given)s %(middle)s %(family)s</b> · %(gender)s · born %(born)s</p><p>☎ %(phone)s, %(street)s, %(city)s",
    """
    "extension":[
      {"url":"http://hl7.org/fhir/us/core/StructureDefinition/us-core-birthsex","valueCode":"%(sex)s"},
      {"url":"http://hl7.org/fhir/StructureDefinition/patient-mothersMaidenName","valueString":"%(maiden)s"}],
    "identifier":[{"use":"official","system":"https://ehr.example.org/records","value":"%(id)s"}],
    "active":true,"name":[
      {"use":"official","family":"%(family)s","given":["%(given)s","%(middle)s"]},
      {"use":"usual","text":"%(given)s %(family)s","family":"%(family)s","given":["%(given)s"]}],
    "telecom":[%(telecom)s],"gender":"%(gender)s","birthDate":"%(born)s","address":[%(address)s],
    "maritalStatus":<v3-MaritalStatus|M|Married>,
    "contact":[{"relationship":[<v2-0131|C|Emergency Contact>,<v3-RoleCode|SPS|spouse>],
      "name":{"family":"%(maiden)s","given":["%(middle)s"]},"telecom":[%(telecom)s],"address":%(address)s}],
    "communication":[{"language":<bcp47|en-US|English>,"preferred":true},{"language":<bcp47|es-US|Spanish>}]
    """,
)
ORGANIZATION = _template(
    "Organization",
    "organization",
    "%(name)s · %(phone)s",
    """
    "identifier":[{"use":"official","system":"https://ehr.example.org/records","value":"%(id)s"}],
    "active":true,"type":[<organization-type|prov|Healthcare Provider>],
    "name":"%(name)s","telecom":[%(telecom)s],"address":[%(address)s]
    """,
)
PRACTITIONER = _template(
    "Practitioner",
    "practitioner",
    "Dr. %(given)s %(family)s · %(phone)s",
    """
    "identifier":[{"use":"official","system":"https://ehr.example.org/records","value":"%(id)s"}],
    "active":true,"name":[{"use":"official","family":"%(family)s","given":["%(given)s"],"prefix":["Dr."]}],
    "telecom":[%(telecom)s],"address":[%(address)s],"gender":"%(gender)s",
    "qualification":[{"code":<v2-0360|MD|Doctor of Medicine>}]
    """,
)
ENCOUNTER = _template(
    "Encounter",
    "encounter",
    "%(display)s from %(start)s to %(end)s",
    """
    "identifier":[{"use":"official","system":"https://ehr.example.org/records","value":"%(id)s"}],
    "status":"finished",
    "class":{"system":"http://terminology.hl7.org/CodeSystem/v3-ActCode","code":"AMB","display":"ambulatory"},
    "type":[<sct|%(code)s|%(display)s>],"subject":{"reference":"Patient/%(patient)s"},
    "participant":[{"type":[<v3-ParticipationType|PPRF|primary performer>],
      "period":{"start":"%(start)s","end":"%(end)s"},"individual":{"reference":"Practitioner/%(practitioner)s"}}],
    "period":{"start":"%(start)s","end":"%(end)s"},
    "serviceProvider":{"reference":"Organization/%(organization)s"}
    """,
)
OBSERVATION = _template(
    "Observation",
    "%(profile)s",
    "%(display)s: %(value)s %(unit)s",
    """
    "status":"final","category":[<observation-category|%(category)s|%(group)s>],
    "code":<loinc|%(code)s|%(display)s>,%(visit)s,"effectiveDateTime":"%(start)s","issued":"%(end)s",
    "performer":[{"reference":"Practitioner/%(practitioner)s"}],
    "valueQuantity":{"value":%(value)s,"unit":"%(unit)s","system":"http://unitsofmeasure.org","code":"%(unit)s"},
    "interpretation":[<v3-ObservationInterpretation|%(flag)s|%(meaning)s>],
    "referenceRange":[{"low":{"value":%(low)s,"unit":"%(unit)s"},"high":{"value":%(high)s,"unit":"%(unit)s"}}]
    """,
)
CONDITION = _template(
    "Condition",
    "condition-encounter-diagnosis",
    "%(display)s since %(start)s",
    """
    "clinicalStatus":<condition-clinical|active|Active>,
    "verificationStatus":<condition-ver-status|confirmed|Confirmed>,
    "category":[<condition-category|encounter-diagnosis|Encounter Diagnosis>],"code":<sct|%(code)s|%(display)s>,
    %(visit)s,"onsetDateTime":"%(start)s","recordedDate":"%(end)s",
    "recorder":{"reference":"Practitioner/%(practitioner)s"}
    """,
)
MEDICATION_REQUEST = _template(
    "MedicationRequest",
    "medicationrequest",
    "%(display)s, one tablet daily",
    """
    "status":"active","intent":"order","medicationCodeableConcept":<rxnorm|%(code)s|%(display)s>,
    %(visit)s,"authoredOn":"%(start)s","requester":{"reference":"Practitioner/%(practitioner)s"},
    "dosageInstruction":[{"text":"One tablet daily","timing":{"repeat":{"frequency":1,"period":1,"periodUnit":"d"}},
      "route":<sct|26643006|Oral route>,"doseAndRate":[{"doseQuantity":{"value":1,"unit":"tablet"}}]}],
    "dispenseRequest":{"numberOfRepeatsAllowed":3,"quantity":{"value":30,"unit":"tablet"}}
    """,
)
PROCEDURE = _template(
    "Procedure",
    "procedure",
    "%(display)s from %(start)s to %(end)s",
    """
    "status":"completed","category":<sct|103693007|Diagnostic procedure>,"code":<sct|%(code)s|%(display)s>,
    %(visit)s,"performedPeriod":{"start":"%(start)s","end":"%(end)s"},
    "performer":[{"actor":{"reference":"Practitioner/%(practitioner)s"},
      "onBehalfOf":{"reference":"Organization/%(organization)s"}}]
    """,
)
IMMUNIZATION = _template(
    "Immunization",
    "immunization",
    "%(display)s on %(start)s",
    """
    "status":"completed","vaccineCode":<cvx|%(code)s|%(display)s>,"patient":{"reference":"Patient/%(patient)s"},
    "encounter":{"reference":"Encounter/%(encounter)s"},"occurrenceDateTime":"%(start)s","primarySource":true,
    "site":<v3-ActSite|LA|left arm>,"route":<v3-RouteOfAdministration|IM|Injection, intramuscular>,
    "doseQuantity":{"value":0.5,"unit":"mL","system":"http://unitsofmeasure.org","code":"mL"},
    "performer":[{"actor":{"reference":"Practitioner/%(practitioner)s"}}]
    """,
)
DIAGNOSTIC_REPORT = _template(
    "DiagnosticReport",
    "diagnosticreport-lab",
    "%(display)s of %(start)s",
    """
    "status":"final","category":[<v2-0074|LAB|Laboratory>],"code":<loinc|%(code)s|%(display)s>,
    %(visit)s,"effectiveDateTime":"%(start)s","issued":"%(end)s",
    "performer":[{"reference":"Organization/%(organization)s"}],
    "resultsInterpreter":[{"reference":"Practitioner/%(practitioner)s"}],"result":%(results)s,
    "presentedForm":[{"contentType":"text/plain","title":"%(display)s","data":"%(form)s"}]
    """,
)


def _one(items: list[Item], draw: Draw) -> Item:
    return items[int(draw() * len(items))]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _contact(draw: Draw) -> dict[str, str]:
    """Where to reach somebody, and when that was recorded."""
    city, state, postcode = _one(PLACES, draw)
    street, phone = f"{int(draw() * 900) + 1} {_one(STREETS, draw)}", f"555-{int(draw() * 10_000_000):07}"
    address = {"line": [street], "city": city, "state": state, "postalCode": postcode, "country": "US"}
    telecom = [{"system": "phone", "value": phone, "use": "work"}, {"system": "sms", "value": phone, "use": "mobile"}]
    rendered = {"address": _json(address), "telecom": _json(telecom)[1:-1]}
    return dict(rendered, city=city, street=street, phone=phone, end=EXPORTED_AT)


def _person(draw: Draw) -> dict[str, str]:
    gender = "female" if draw() < 0.51 else "male"
    return dict(_contact(draw), gender=gender, given=_one(GIVEN[gender], draw), family=_one(FAMILIES, draw))


def _patient(clinic: _Clinic, number: int, draw: Draw) -> str:
    person = _person(draw)
    sex, middle = person["gender"][0].upper(), _one(GIVEN[person["gender"]], draw)
    maiden, born = _one(FAMILIES, draw), _one(BIRTH_DAYS, draw)
    patient_id = clinic.id_of("Patient", number)
    return PATIENT % dict(person, id=patient_id, sex=sex, middle=middle, maiden=maiden, born=born)


def _organization(clinic: _Clinic, number: int, draw: Draw) -> str:
    contact = _contact(draw)
    name = f"{contact['city']} {_one(CLINICS, draw)}"
    return ORGANIZATION % dict(contact, id=clinic.id_of("Organization", number), name=name)


def _practitioner(clinic: _Clinic, number: int, draw: Draw) -> str:
    return PRACTITIONER % dict(_person(draw), id=clinic.id_of("Practitioner", number))


def _encounter(clinic: _Clinic, number: int, draw: Draw) -> str:
    code, display = _one(VISITS, draw)
    visit = clinic.visit(number)
    return ENCOUNTER % dict(visit, id=visit["encounter"], code=code, display=display)


def _observation(clinic: _Clinic, number: int, draw: Draw) -> str:
    """At each visit laboratory results of one panel and vital signs, in turn."""
    visit = clinic.visit_of("Observation", number)
    place = number - clinic.first_of("Observation", visit["number"])
    if place % 2:
        category, measured = VITAL_SIGN, _one(VITALS, draw)
    else:
        category, measured = LAB, LABS[visit["number"] % len(PANELS) * 3 + place // 2 % 3]
    code, display, unit, low, high, decimals = measured
    value = round(low + (draw() * 1.2 - 0.1) * (high - low), decimals)
    flag = "L" if value < low else "H" if value > high else "N"
    scale = {"unit": unit, "low": low, "high": high, "flag": flag, "meaning": FLAGS[flag]}
    common = dict(visit, id=clinic.id_of("Observation", number), code=code, display=display)
    return OBSERVATION % dict(common, **category, **scale, value=f"{value:.{decimals}f}")


def _diagnostic_report(clinic: _Clinic, number: int, draw: Draw) -> str:
    """The laboratory results of a visit."""
    visit = clinic.visit_of("DiagnosticReport", number)
    first, end = (clinic.first_of("Observation", visit["number"] + following) for following in (0, 1))
    observations = [clinic.id_of("Observation", result) for result in range(first, end, 2)]
    results = _json([{"reference": f"Observation/{observation}"} for observation in observations])
    code, display = PANELS[visit["number"] % len(PANELS)]
    form = base64.b64encode(f"{display} of {visit['start']}\n{REMARKS}".encode()).decode()
    report_id = clinic.id_of("DiagnosticReport", number)
    return DIAGNOSTIC_REPORT % dict(visit, id=report_id, code=code, display=display, results=results, form=form)


def _coded(kind: str, template: str, codes: list[tuple[str, str]]) -> Maker:
    """Makes resources of a type of which only the code differs within a visit."""

    def make(clinic: _Clinic, number: int, draw: Draw) -> str:
        code, display = _one(codes, draw)
        visit = clinic.visit_of(kind, number)
        return template % dict(visit, id=clinic.id_of(kind, number), code=code, display=display)

    return make


MAKERS: dict[str, Maker] = {
    "Patient": _patient,
    "Organization": _organization,
    "Practitioner": _practitioner,
    "Encounter": _encounter,
    "Observation": _observation,
    "Condition": _coded("Condition", CONDITION, CONDITIONS),
    "MedicationRequest": _coded("MedicationRequest", MEDICATION_REQUEST, MEDICATIONS),
    "Procedure": _coded("Procedure", PROCEDURE, PROCEDURES),
    "Immunization": _coded("Immunization", IMMUNIZATION, VACCINES),
    "DiagnosticReport": _diagnostic_report,
}


def _with(member: str, value: bytes) -> Callable[[bytes], bytes]:
    """Puts another value, as JSON, in the place of the first string of that name."""
    found, member_with = re.compile(rb'"%b":"[^"]*"' % member.encode()), b'"%b":%b' % (member.encode(), value)
    return lambda line: found.sub(lambda _: member_with, line, count=1)


FAULTS: dict[str, Callable[[bytes], bytes]] = {
    "not JSON": lambda line: b"Patient " + line,
    "malformed JSON: a comma too many": lambda line: line.replace(b",", b",,", 1),
    "malformed JSON: a number that JSON does not know": _with("gender", b"NaN"),
    "malformed JSON: a control character in a string": _with("family", b'"Do\te"'),
    "malformed JSON: a NUL byte in a string": _with("family", b'"Do\0e"'),
    "malformed JSON: an escape that JSON does not know": _with("family", rb'"Do\x65"'),
    "malformed JSON: half of a surrogate pair": _with("family", rb'"Do\ud800e"'),
    "truncated JSON": lambda line: line[: len(line) // 2],
    "two resources on one line": lambda line: line + line,
    "nested too deeply": _with("gender", b"[" * 20_000 + b"]" * 20_000),
    "an array, not an object": lambda line: b"[" + line + b"]",
    "null, not an object": lambda line: b"null",
    "not UTF-8: a name in Latin-1": _with("family", "Muñoz".encode("latin-1").join((b'"', b'"'))),
    "NUL as an escape in a string": _with("family", rb'"Do\u0000e"'),
    "resourceType is missing": lambda line: line.replace(b'"resourceType":"Patient",', b"", 1),
    "resourceType is empty": _with("resourceType", b'""'),
    "resourceType is not a string": _with("resourceType", b"1"),
    "resourceType is unknown": _with("resourceType", b'"Patiemt"'),
    "resourceType is not the declared one": _with("resourceType", b'"Person"'),
    "id is empty": _with("id", b'""'),
    "id has characters that an id may not have": _with("id", b'"a_b/c"'),
    "id is longer than 64 characters": _with("id", b'"' + b"x" * 65 + b'"'),
    "id is a number": _with("id", b"12345"),
    "id is null": _with("id", b"null"),
}
