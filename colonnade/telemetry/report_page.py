"""The page template that `report` fills in: HTML and its style sheet. Values are escaped when inserted."""

from __future__ import annotations

from jinja2 import Environment, StrictUndefined

# Distinguishable with colour vision deficiency (after Okabe and Ito, "Color universal design", 2008), in a darker and
# a lighter set.
_LIGHT = ("#0a6fb0", "#cf4f00", "#00805c", "#b0508a", "#8a6d00", "#3f8fc4", "#6b4fa0", "#5a5a5a")
_DARK = ("#5ab4ec", "#ff9150", "#3fd6a4", "#ee9ccb", "#e3c53f", "#a5d8f7", "#bda3f2", "#bdbdbd")


def _variables(colors: tuple[str, ...]) -> str:
    return " ".join(f"--curve-{index}: {color};" for index, color in enumerate(colors))


_STYLE = (
    ":root { color-scheme: light dark; --ink: #1c1f23; --paper: #ffffff; --card: #f6f7f9; --line: #d9dce1; "
    + f"--quiet: #5c636c; {_variables(_LIGHT)} }}\n"
    + "@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --paper: #14171a; --card: #1d2125; "
    + f"--line: #363c43; --quiet: #9aa3ad; {_variables(_DARK)} }} }}\n"
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1500px; padding: 1rem clamp(0.6rem, 2vw, 2rem) 3rem; color: var(--ink);
  background: var(--paper); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0.4rem 0 0.8rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 1.8rem 0 0.6rem; }
h3 { font-size: 0.95rem; margin: 0 0 0.2rem; }
.scroll { overflow-x: auto; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 10.5rem), 1fr)); gap: 0.35rem 1.2rem;
  margin: 0; }
.facts div { border-bottom: 1px solid var(--line); padding-bottom: 0.2rem; }
dt { color: var(--quiet); font-size: 0.8rem; } dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.2rem 1rem 0.2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody th { font-weight: normal; color: var(--quiet); white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 0.9rem;
  margin-top: 1.2rem; }
figure { margin: 0; padding: 0.7rem 0.7rem 0.3rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; min-width: 0; display: flex; flex-direction: column; }
figure svg { display: block; width: 100%; height: auto; margin-top: auto; }
.axis { text-align: center; color: var(--quiet); font-size: 0.78rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.1rem 0.9rem; font-size: 0.8rem; min-height: 1.2rem; margin: 0;
  padding: 0; list-style: none; overflow-wrap: anywhere; }
.legend i { display: inline-block; width: 1.4rem; border-top: 2.5px solid currentColor; vertical-align: middle;
  margin-right: 0.35rem; }
.legend .faint { opacity: 0.45; } .legend .dashed { border-top-style: dashed; }
.legend .dotted { border-top-style: dotted; }
.legend .dots { border-top-width: 1.5px; position: relative; }
.legend .dots::after { content: ""; position: absolute; left: 0.5rem; top: -0.27rem; width: 0.4rem; height: 0.4rem;
  border-radius: 50%; background: currentColor; }
details { border: 1px solid var(--line); border-radius: 8px; padding: 0.4rem 0.8rem; margin-bottom: 0.5rem; }
summary { cursor: pointer; }
blockquote { margin: 0.6rem 0; padding: 0.1rem 0 0.1rem 0.8rem; border-left: 3px solid var(--line);
  font: 0.85rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
blockquote b { color: var(--curve-0); }
.quiet { color: var(--quiet); }
"""
)

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ labels | join(", ") }}</title>
<style>{{ style | safe }}{% for index in range(curve_colors) %}.c{{ index }} { color: var(--curve-{{ index }}); }
{% endfor %}</style>
</head>
<body>
<h1>{{ labels | join(" · ") }}</h1>
{% if labels | length == 1 %}<dl class="facts">
{% for name, values in facts %}<div><dt>{{ name }}</dt><dd>{{ values[0] }}</dd></div>
{% endfor %}</dl>
{% else %}<div class="scroll"><table>
<thead><tr><th></th>{% for label in labels %}<th class="c{{ loop.index0 % curve_colors }}">{{ label }}</th>
{% endfor %}</tr></thead>
<tbody>
{% for name, values in facts %}<tr><th>{{ name }}</th>{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endif %}
<div class="charts">
{% for panel in panels %}<figure role="img" aria-label="{{ panel.title }} over optimizer steps">
<h3>{{ panel.title }}</h3>
<ul class="legend">{% for label, color, style in panel.legend %}
<li><i class="{{ style }}{% if color is not none %} c{{ color % curve_colors }}{% endif %}"></i>{{ label }}</li>
{%- endfor %}</ul>
{{ panel.svg | safe }}
<div class="axis">optimizer step</div>
</figure>
{% endfor %}</div>
{% for line in missing %}<p class="quiet">{{ line }}</p>
{% endfor %}
{% for label, steps, earlier in samples if steps -%}
<h2>Samples{% if labels | length > 1 %} of {{ label }}{% endif %}</h2>
{% for step, texts in steps %}<details{% if loop.first %} open{% endif %}><summary>step {{ step }}</summary>
{% for sample in texts %}<blockquote><b>{{ sample.prompt }}</b>{{ sample.text }}</blockquote>
{% endfor %}</details>
{% endfor %}{% if earlier %}<p class="quiet">{{ earlier }} earlier steps with samples are in metrics.jsonl.</p>
{% endif %}{% endfor %}
</body>
</html>
"""

# autoescape: prompts and corpus names may contain anything. StrictUndefined: a missing template variable is a bug.
_environment = Environment(autoescape=True, undefined=StrictUndefined)
_environment.globals["style"] = _STYLE
PAGE = _environment.from_string(_TEMPLATE)
