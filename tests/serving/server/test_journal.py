import logging

from hf_csm.serving.server.journal import write


def test_an_event_is_one_line_whatever_its_fields_hold(caplog):
    caplog.set_level(logging.INFO, logger="hf_csm.serving")
    write("request", path='/a\n"b" INFO request', status=404)
    write("conversation failed", is_error=True, session=3)
    assert [record.levelname for record in caplog.records] == ["INFO", "ERROR"]
    assert caplog.messages == ['request path="/a\\n\\"b\\" INFO request" status=404', "conversation failed session=3"]
