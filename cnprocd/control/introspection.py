"""The methods of org.varlink.service, which every Varlink service has. PURE."""

from __future__ import annotations

from cnprocd.control.interface import DESCRIPTION, SERVICE_DESCRIPTION
from cnprocd.control.protocol import (
    INTERFACE,
    INTERFACE_NOT_FOUND,
    INVALID_PARAMETER,
    METHOD_NOT_FOUND,
    SERVICE,
    WRONG_USAGE,
    Call,
    Failure,
    Reply,
)

_DESCRIPTIONS = {INTERFACE: DESCRIPTION, SERVICE: SERVICE_DESCRIPTION}


def introspect(call: Call, version: str) -> Reply | Failure:
    """Return the reply to a call of org.varlink.service. `version` is that of the daemon."""
    method = call.method.removeprefix(f"{SERVICE}.")
    if method == "GetInfo":
        interfaces = list(_DESCRIPTIONS)
        return Reply(
            {"vendor": "cnprocd", "product": "cnprocd", "version": version, "url": "", "interfaces": interfaces}
        )
    if method != "GetInterfaceDescription":
        return no_such_method(call.method)
    interface = call.parameters.get("interface")
    if not isinstance(interface, str):
        return invalid_parameter("interface", f"{method}: interface: expected a string")
    description = _DESCRIPTIONS.get(interface)
    return Reply({"description": description}) if description is not None else no_such_interface(interface)


def no_such_interface(interface: str) -> Failure:
    """Return the error of an interface that this service does not have."""
    hint, details = f"this service has {INTERFACE}", {"interface": interface[:256]}
    return Failure(INTERFACE_NOT_FOUND, f"unknown interface {interface[:40]!r}", hint, WRONG_USAGE, details)


def no_such_method(method: str, known: str = "") -> Failure:
    """Return the error of a method that its interface does not have."""
    what, details = f"unknown method {method[:60]!r}", {"method": method[:256]}
    return Failure(METHOD_NOT_FOUND, what, f"the methods are {known}" if known else "", WRONG_USAGE, details)


def invalid_parameter(parameter: str, what: str) -> Failure:
    """Return the error of a parameter that is missing, unknown or wrong."""
    return Failure(INVALID_PARAMETER, what, "", WRONG_USAGE, {"parameter": parameter[:256]})
