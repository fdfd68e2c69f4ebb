"""What the page adds to Streamlit's parts: a little style, a copy button, a drawer that closes."""

import streamlit as st

STYLE = """<style>
[data-testid="stBottomBlockContainer"] > [data-testid="stVerticalBlock"] { position: relative; }
.st-key-stop { position: absolute; right: 1rem; bottom: 0.5rem; width: auto; z-index: 1; }
[class*="st-key-under"] { min-height: 2.5rem; }
</style>"""
COPY = st.components.v2.component(
    "copy",
    html="""<button><svg viewBox="0 0 16 16"><rect x="5.5" y="5.5" width="8" height="8" rx="1.5"/>
<path d="M10.5 3v-.5h-8v8H3"/><path class="done" d="M7.5 9.5l1.5 1.5 2.5-3"/></svg></button>""",
    css="""button { background: none; border: 0; padding: 0.5rem; cursor: pointer; line-height: 0;
color: var(--st-text-color); opacity: 0.7; }
button:hover, button:focus-visible { color: var(--st-primary-color); opacity: 1; }
svg { width: 1rem; height: 1rem; fill: none; stroke: currentColor; stroke-width: 1.2; }
.done { visibility: hidden; }
.copied .done { visibility: visible; }""",
    js="""export default function ({ data, parentElement }) {
  const button = parentElement.querySelector("button")
  button.title = button.ariaLabel = data.label
  button.onclick = async () => {
    if (navigator.clipboard) {
      await navigator.clipboard.writeText(data.text)
    } else {  // not on https or this machine
      const area = document.createElement("textarea")
      area.value = data.text
      document.body.append(area)
      area.select()
      document.execCommand("copy")
      area.remove()
    }
    button.classList.add("copied")
    setTimeout(() => button.classList.remove("copied"), 1500)
  }
}""",
)
# On a phone, where it covers the page, the sidebar closes once a conversation is chosen in it.
DRAWER = st.components.v2.component(
    "drawer",
    js="""export default function ({ data }) {
  if (window.closedDrawer === data.chosen) return
  window.closedDrawer = data.chosen
  if (data.chosen && window.innerWidth < 768) {
    const open = ':is([aria-expanded="true"], [data-collapsed="false"])'  // by Streamlit's version
    const sidebar = document.querySelector('[data-testid="stSidebar"]' + open)
    sidebar?.querySelector('[data-testid="stSidebarCollapseButton"] button')?.click()
  }
}""",
)
