// Markdown, the small part that answers use: paragraphs, headings, lists, code, bold, italics. Links and pictures stay text.

import { copyButton, element } from './dom.js';

const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const FENCE = /^\s*(`{3,}|~{3,})(.*)$/;

/** The blocks of a text: {kind, lines, note}. */
function blocks(source) {
  const found = [];
  let block = null;
  let fence = null;
  const start = (kind, note = '') => found.push((block = { kind, note, lines: [] }));
  for (const line of source.split('\n')) {
    const mark = FENCE.exec(line);
    if (fence) {
      if (mark && !mark[2].trim() && mark[1].startsWith(fence)) block = fence = null;
      else block.lines.push(line);
    } else if (mark && !mark[2].includes('`')) {
      fence = mark[1];
      start('code', mark[2].trim().split(/\s/)[0]);
    } else if (/^ {0,3}#{1,6}\s/.test(line)) {
      start('heading', String(line.trim().indexOf(' ')));
      block.lines.push(line.trim().replace(/^#+\s+/, ''));
      block = null;
    } else if (/^ {0,3}([-*_])(\s*\1){2,}\s*$/.test(line)) {
      start('rule');
      block = null;
    } else if (ITEM.test(line)) {
      if (block?.kind !== 'list') start('list');
      block.lines.push(line);
    } else if (!line.trim()) {
      // A list may have blank lines between its items.
      if (block?.kind === 'list') block.blank = true;
      else block = null;
    } else {
      if (!block || (block.blank && block.lines.at(-1) && !/^\s/.test(line))) start('text');
      block.lines.push(line);
    }
    if (line.trim() && block) block.blank = false;
  }
  return found;
}

/** Bold, italics and code of a line or paragraph. Marks without a partner stay as they are. */
function inline(source) {
  if (source.length > 20000) return [source]; // So many marks could freeze the browser.
  const parts = [];
  const alone = new Set(); // Marks without a partner in the rest of the text, which is then searched only once.
  let plain = 0;
  let at = 0;
  const take = (end, next, made) => {
    parts.push(source.slice(plain, end), made);
    plain = at = next;
  };
  while (at < source.length) {
    const mark = source[at] === '`' ? /`+/y : /\*{1,3}/y;
    mark.lastIndex = at;
    const [open] = mark.exec(source) ?? [''];
    const from = at + open.length;
    let close = open && !alone.has(open) ? source.indexOf(open, from) : -1;
    if (open && close < 0) alone.add(open);
    // Emphasis begins and ends at a word: `2 * 3 * 4` has none.
    if (close > 0 && open[0] === '*' && (close === from || /\s/.test(source[from]) || /\s/.test(source[close - 1]))) close = -1;
    if (close < 0) at = from + (open ? 0 : 1);
    else if (open[0] === '`') take(at, close + open.length, element('code', '', source.slice(from, close).trim()));
    else {
      const inner = inline(source.slice(from, close));
      const italics = open.length === 2 ? inner : [element('em', '', ...inner)];
      take(at, close + open.length, open.length === 1 ? italics[0] : element('strong', '', ...italics));
    }
  }
  parts.push(source.slice(plain));
  return parts.filter((part) => part !== '');
}

function list(lines) {
  const open = []; // From the outer list to the inner one: {indent, made}.
  const items = [];
  let first = null;
  for (const line of lines) {
    const [, space, ordinal, content] = ITEM.exec(line) ?? [];
    if (space === undefined) {
      items.at(-1).source += `\n${line.trim()}`;
      continue;
    }
    const indent = space.replaceAll('\t', '    ').length;
    while (open.length > 1 && indent < open.at(-1).indent) open.pop();
    const tag = ordinal === undefined ? 'UL' : 'OL';
    const deeper = !open.length || indent > open.at(-1).indent + 1;
    if ((deeper && open.length < 8) || open.at(-1).made.tagName !== tag) {
      const made = element(tag);
      if (ordinal !== undefined) made.start = Number(ordinal);
      if (!open.length) first = element('div', '', made);
      else if (deeper && open.length < 8) items.at(-1).item.append(made);
      else open.pop().made.after(made);
      open.push({ indent, made });
    }
    const body = element('span');
    const item = element('li', '', body);
    open.at(-1).made.append(item);
    items.push({ item, body, source: content });
  }
  for (const { body, source } of items) body.append(...inline(source));
  return first;
}

const RENDER = {
  text: ({ lines }) => element('p', '', ...inline(lines.join('\n'))),
  heading: ({ lines, note }) => element(`h${Math.min(6, Number(note) + 2)}`, '', ...inline(lines[0])),
  rule: () => element('hr'),
  list: ({ lines }) => list(lines),
  code: ({ lines, note }) => {
    const code = element('code', '', lines.join('\n'));
    const pre = element('pre', '', code);
    pre.tabIndex = 0; // Long lines are scrolled with the keyboard, too.
    pre.setAttribute('role', 'group');
    pre.setAttribute('aria-label', 'Code');
    return element('div', 'code', element('div', 'actions', element('span', '', note || 'code'), copyButton(() => code.textContent)), pre);
  },
};

/** Shows a text. Blocks that are the same as before stay, so that a selection survives while an answer grows. */
export function render(into, source) {
  const all = blocks(source);
  all.forEach((block, i) => {
    const same = JSON.stringify(block);
    const old = into.children[i];
    if (old?.block === same) return;
    const made = RENDER[block.kind](block);
    made.block = same;
    if (old) old.replaceWith(made);
    else into.append(made);
  });
  while (into.children.length > all.length) into.lastChild.remove();
}
