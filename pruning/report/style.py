"""The page's style sheet: light, dark as the reader's system says, and paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfaf8; --panel: #ffffff; --text: #1d1f23; --soft: #5c626c; --rule: #e4e2dd;
  --axis: #9a9ea6; --heat: #b4431f; --on-heat: #ffffff; --accent: #1f5fa8;
  --s0: #1f5fa8; --s1: #c2571a; --s2: #23805a; --s3: #8a4bb0; --s4: #a3862a; --s5: #4c5563;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #131519; --panel: #1b1e24; --text: #e8e6e1; --soft: #a1a7b2; --rule: #2e323a;
  --axis: #6b717c; --heat: #e8764b; --on-heat: #17191d; --accent: #7db4f0;
  --s0: #74b0f4; --s1: #f09a5b; --s2: #5cc596; --s3: #c79bea; --s4: #dcc266; --s5: #b6bdc9;
} }
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 1.3rem; margin: 56px 0 4px; letter-spacing: -0.005em; }
h3 { font-size: 1rem; margin: 0 0 8px; }
p { margin: 0 0 12px; max-width: 75ch; }
.soft, figcaption, .facts { color: var(--soft); font-size: 0.875rem; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 16px 0 0; }
.facts dt { font-weight: 600; } .facts dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; min-width: 0; }
.panels {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 16px;
}
.panel {
  background: var(--panel); border: 1px solid var(--rule); border-radius: 10px;
  padding: 14px 14px 10px; min-width: 0;
}
.wide { overflow-x: auto; }
svg.plot { display: block; width: 100%; height: auto; }
svg.grid { display: block; width: 100%; height: auto; min-width: 640px; }
.small svg.grid { min-width: 0; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .label { text-anchor: middle; fill: var(--text); font-size: 11.5px; }
svg .middle, svg .cell { text-anchor: middle; } svg .end { text-anchor: end; }
svg .cell { fill: var(--text); font-size: 10.5px; } svg .cell.strong { fill: var(--on-heat); }
svg .rule { stroke: var(--rule); } svg .axis { stroke: var(--axis); }
svg .line { fill: none; stroke-width: 2; } svg .bar { fill: none; stroke-width: 1.3; }
svg .mark { stroke: var(--panel); stroke-width: 1; } svg .target { fill: transparent; }
svg .heat { fill: var(--heat); } svg .empty { fill: none; stroke: var(--rule); }
.line.s0, .bar.s0 { stroke: var(--s0); } .mark.s0 { fill: var(--s0); }
.line.s1, .bar.s1 { stroke: var(--s1); } .mark.s1 { fill: var(--s1); }
.line.s2, .bar.s2 { stroke: var(--s2); } .mark.s2 { fill: var(--s2); }
.line.s3, .bar.s3 { stroke: var(--s3); } .mark.s3 { fill: var(--s3); }
.line.s4, .bar.s4 { stroke: var(--s4); } .mark.s4 { fill: var(--s4); }
.line.s5, .bar.s5 { stroke: var(--s5); } .mark.s5 { fill: var(--s5); }
.line.s1 { stroke-dasharray: 7 3; } .line.s2 { stroke-dasharray: 2 3; }
.line.s3 { stroke-dasharray: 9 3 2 3; } .line.s4 { stroke-dasharray: 4 2; }
.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 0; margin: 8px 0 12px;
  font-size: 0.875rem;
}
.legend li { display: flex; align-items: center; gap: 8px; }
table {
  border-collapse: collapse; font-size: 0.8rem; font-variant-numeric: tabular-nums; width: 100%;
}
th, td {
  padding: 5px 7px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule);
}
td small { display: block; color: var(--soft); font-size: 0.75rem; line-height: 1.1; }
th { color: var(--soft); font-weight: 600; } th.group { text-align: center; }
th.left, td.left { text-align: left; }
tr.first td { border-top: 2px solid var(--axis); }
.prompt {
  white-space: pre-wrap; overflow-wrap: anywhere; font-weight: 600; margin: 28px 0 10px;
  max-width: none;
}
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 12px; }
.answer {
  background: var(--panel); border: 1px solid var(--rule); border-radius: 10px;
  padding: 12px 14px; min-width: 0;
}
.answer h3 small { font-weight: 400; color: var(--soft); }
.answer.full { border-color: var(--accent); }
.answer pre {
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: inherit; font-size: 0.875rem;
}
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--accent); font-size: 0.875rem; }
@media print {
  :root {
    --page: #fff; --panel: #fff; --text: #000; --soft: #444; --rule: #ccc; --axis: #777;
    --heat: #b4431f; --on-heat: #fff; --accent: #1f5fa8;
    --s0: #1f5fa8; --s1: #c2571a; --s2: #23805a; --s3: #8a4bb0; --s4: #8a7020; --s5: #4c5563;
  }
  @page { size: A4; margin: 14mm; }
  body { font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  h2 { margin-top: 22px; }
  h2, h2 + p, .legend, .prompt { break-after: avoid; }
  .answers { grid-template-columns: repeat(4, 1fr); gap: 8px; }
  td small { font-size: 6.5pt; }
  figure, .panel, .answer, tr { break-inside: avoid; }
  .panels { grid-template-columns: 1fr 1fr; gap: 10px; }
  .wide { overflow: visible; } svg.grid { min-width: 0; }
  table { font-size: 7.5pt; } th, td { padding: 3px 5px; }
  details:not([open]) { display: none; }
}
"""
