"""The page at ``/docs``: the OpenAPI document, readable, from one self-contained HTML file.

Loads nothing from anywhere: style and script are inline and the document is embedded, so the page works
without network and under a strict content security policy (`CONTENT_SECURITY_POLICY`).
"""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache

_STYLE = """
:root{color-scheme:light dark;--line:color-mix(in srgb,currentColor 18%,transparent)}
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{margin-bottom:0}h2{margin-top:2.5rem}code,pre{font:13px/1.45 ui-monospace,monospace}
details{border:1px solid var(--line);border-radius:6px;margin:.5rem 0;padding:.4rem .8rem}
summary{cursor:pointer}table{border-collapse:collapse;width:100%;margin:.5rem 0}
td,th{border-top:1px solid var(--line);padding:.3rem .6rem .3rem 0;text-align:left;vertical-align:top}
pre{overflow:auto;border:1px solid var(--line);border-radius:6px;padding:.6rem}
.m{display:inline-block;min-width:3.2rem;font-weight:600}.d{opacity:.75}
"""

_SCRIPT = """
const api = JSON.parse(document.getElementById('api').textContent);
const el = (tag, attrs, ...kids) => {
  const e = Object.assign(document.createElement(tag), attrs || {});
  e.append(...kids.filter(k => k !== null && k !== undefined)); return e;
};
const words = text => {
  const span = el('span');
  (text || '').split('`').forEach((part, i) => span.append(i % 2 ? el('code', {}, part) : part));
  return span;
};
const type = s => {
  if (!s || !Object.keys(s).length) return document.createTextNode('any');
  if (s.$ref) { const n = s.$ref.split('/').pop(); return el('a', {href: '#' + n}, n); }
  const many = s.anyOf || s.oneOf;
  if (many) {
    const span = el('span');
    many.forEach((one, i) => span.append(i ? ' | ' : '', type(one)));
    return span;
  }
  if (s.enum) return el('span', {}, s.enum.map(v => JSON.stringify(v)).join(' | '));
  if (s.const !== undefined) return el('span', {}, JSON.stringify(s.const));
  if (s.type === 'array') return el('span', {}, 'list of ', s.items ? type(s.items) : 'any');
  const bounds = [['minimum', '\\u2265'], ['maximum', '\\u2264'], ['exclusiveMinimum', '>'], ['exclusiveMaximum', '<'],
    ['minLength', 'length \\u2265'], ['maxLength', 'length \\u2264']].filter(b => s[b[0]] !== undefined)
    .map(b => b[1] + ' ' + s[b[0]]).join(', ');
  return el('span', {}, s.type + (bounds ? ' (' + bounds + ')' : ''));
};
const table = (head, rows) => el('table', {}, el('tr', {}, ...head.map(h => el('th', {}, h))),
  ...rows.map(r => el('tr', {}, ...r.map(c => el('td', {}, c)))));
const root = document.getElementById('out');
const lead = api.info.summary + ' Version ' + api.info.version + '.';
root.append(el('h1', {}, api.info.title), el('p', {className: 'd'}, lead));
api.info.description.split('\\n\\n').forEach(p => root.append(el('p', {}, words(p))));
root.append(el('p', {}, el('a', {href: '/openapi.json'}, '/openapi.json')), el('h2', {}, 'Routes'));
for (const [path, methods] of Object.entries(api.paths)) for (const [method, op] of Object.entries(methods)) {
  const box = el('details', {}, el('summary', {}, el('span', {className: 'm'}, method.toUpperCase()),
    el('code', {}, path), ' ', el('span', {className: 'd'}, op.summary)));
  if (op.description) box.append(el('p', {}, words(op.description)));
  if (op.parameters) box.append(el('h4', {}, 'Parameters'), table(['name', 'in', 'type', 'meaning'],
    op.parameters.map(p => [el('code', {}, p.name), p.in, type(p.schema), words(p.description)])));
  const body = op.requestBody && op.requestBody.content['application/json'];
  if (body) {
    const call = 'curl -N ' + location.origin + path + " -H 'content-type: application/json' -d '"
      + JSON.stringify(body.example) + "'";
    box.append(el('h4', {}, 'Body'), el('p', {}, type(body.schema)), el('pre', {}, call));
  }
  box.append(el('h4', {}, 'Answers'), table(['status', 'meaning', 'type'], Object.entries(op.responses).map(([s, r]) =>
    [s, words(r.description), el('span', {}, ...Object.entries(r.content || {}).flatMap(([t, c]) =>
      [el('div', {}, t + ': ', type(c.schema))]))])));
  root.append(box);
}
root.append(el('h2', {}, 'Types'));
for (const [name, s] of Object.entries(api.components.schemas)) {
  const need = new Set(s.required || []);
  const box = el('details', {id: name}, el('summary', {}, el('code', {}, name), ' ',
    el('span', {className: 'd'}, (s.description || '').split('\\n')[0])));
  if (s.properties) box.append(table(['field', 'type', 'meaning'], Object.entries(s.properties).map(([f, p]) =>
    [el('code', {}, f + (need.has(f) ? ' *' : '')), type(p), words(p.description)])));
  root.append(box);
}
const reveal = () => {
  const e = document.getElementById(location.hash.slice(1));
  if (e) { e.open = true; e.scrollIntoView(); }
};
addEventListener('hashchange', reveal); reveal();
"""


def _source(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


CONTENT_SECURITY_POLICY = f"default-src 'none'; style-src {_source(_STYLE)}; script-src {_source(_SCRIPT)}"
"""Send it as ``content-security-policy`` with the page."""


@lru_cache(maxsize=4)
def docs_page(openapi: bytes) -> bytes:
    """Return the HTML page for this OpenAPI document (`schema.openapi`)."""
    embedded = openapi.replace(b"<", b"\\u003c")
    return (
        b'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Holdfast API</title>'
        b'<meta name="viewport" content="width=device-width,initial-scale=1">'
        b"<style>%b</style></head><body><main id=out></main>"
        b"<noscript>This page needs JavaScript; the same is at <a href=/openapi.json>/openapi.json</a>.</noscript>"
        b'<script type="application/json" id="api">%b</script><script>%b</script></body></html>'
    ) % (_STYLE.encode(), embedded, _SCRIPT.encode())
